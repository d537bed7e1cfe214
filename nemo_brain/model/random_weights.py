"""Weights drawn from a seed: each tensor depends on the seed and its name, not on the layout or on padding."""

from __future__ import annotations

import hashlib
import math

import torch
from transformers import PreTrainedTokenizerFast

from nemo_brain.data.stop import named_token_ids

_SCALED = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_UNSCALED = ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "output_layer.weight")


def normal(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on the seed and the name alone: fp32, on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randn(shape, generator=generator)


class RandomWeights:
    """A fresh GPT, initialised as Megatron does (``Weights`` for ``load_weights``).

    Matrices are normal with ``init_method_std`` (embeddings: ``embedding_init_method_std`` where given); those that end
    on the residual stream, ``linear_proj`` and ``linear_fc2``, with ``init_method_std / sqrt(2 * num_layers)``. Layer
    norms are the identity, biases zero.

    Args:
        gpt_config: NeMo ``GPTConfig`` fields; ``num_layers`` is required.
        vocab_size: rows of the embedding, without padding.
        tokenizer: the model's tokenizer.
        seed: the run's seed.
    """

    def __init__(self, gpt_config: dict, vocab_size: int, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.gpt_config = gpt_config
        self.vocab_size = vocab_size
        self.generation_config: dict = {}
        self.tokenizer = tokenizer
        self.seed = seed

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return named_token_ids(self.tokenizer)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The full tensor of that canonical name: fp32, on the CPU. Raises ValueError for a name that no GPT has."""
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if name.endswith("layernorm.weight"):
            zero_centered = self.gpt_config.get("layernorm_zero_centered_gamma", False)
            return torch.zeros(shape) if zero_centered else torch.ones(shape)
        return self._std(name) * normal(self.seed, name, shape)

    def _std(self, name: str) -> float:
        std = self.gpt_config.get("init_method_std", 0.02)
        if name.startswith("embedding."):
            embedding_std = self.gpt_config.get("embedding_init_method_std")
            return std if embedding_std is None else embedding_std
        if name.endswith(_SCALED):
            return std / math.sqrt(2 * self.gpt_config["num_layers"])
        if name.endswith(_UNSCALED):
            return std
        raise ValueError(f"no rule initialises {name}: only dense GPT models can be trained from scratch")
