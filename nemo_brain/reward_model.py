"""A Megatron GPT with a scalar head instead of an output layer: the reward of an output is read at its last token.

Shapes: S positions of a row, K outputs of a micro-batch, H hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_brain.convert.sharding import global_parameters, unwrap
from nemo_brain.convert.weights import Weights
from nemo_brain.gpt import PackedGPTConfig, PackedGPTModel
from nemo_brain.groups import Group, MicroBatch
from nemo_brain.lora import LoRA, load
from nemo_brain.passes import GroupPasses

HEAD = "reward_head.weight"  # the head's canonical name: [1, H], whole on every tensor-parallel rank
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class RewardHead(torch.nn.Module):
    """w . h in fp32, whatever the dtype of the weights and the hidden states: [K, H] -> [K]."""

    def __init__(self, config: PackedGPTConfig):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))

    def forward(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_KH.float(), self.weight.float())[:, 0]


class RewardGPTModel(PackedGPTModel):
    """``PackedGPTModel`` whose last stage ends in a ``RewardHead``."""

    def __init__(self, **options):
        # Tied, the last stage would hold a copy of the embedding and sum its gradient with the first stage's.
        super().__init__(**{**options, "share_embeddings_and_output_weights": False})
        if self.post_process:
            del self.output_layer
            self.reward_head = RewardHead(self.config)

    def forward(self, tokens_1S, positions_1S, attention, select_K, *_, **__) -> torch.Tensor:
        """One chunk's forward pass over one packed row.

        Args:
            tokens_1S, positions_1S, attention: as ``PackedGPTModel.forward``, whose further arguments have no meaning.
            select_K: the position of each output's last token.

        Returns:
            On the last stage the rewards [1, K] (fp32), elsewhere the hidden states for the next stage.
        """
        hidden = self.trunk(tokens_1S, positions_1S, attention)
        if not self.post_process:
            return hidden
        return self.reward_head(hidden[:, 0].index_select(0, select_K))[None]


@dataclass
class RewardGPTConfig(PackedGPTConfig):
    """A NeMo GPTConfig that builds a ``RewardGPTModel``."""

    model_class = RewardGPTModel


class RewardModel(GPTModel):
    """NeMo's GPTModel around ``RewardGPTModel`` chunks.

    Args:
        weights: what the chunks are filled with, the head among them.
        frozen_layers: the embeddings and this many of the first layers are not trained; 0: everything is.
        lora: the adapters to train beside the head, in place of all other weights; None: there are none.
        optim: as in NeMo's GPTModel.
    """

    def __init__(
        self,
        config: RewardGPTConfig,
        weights: Weights,
        frozen_layers: int = 0,
        lora: LoRA | None = None,
        optim=None,
    ):
        super().__init__(config, optim=optim, tokenizer=weights.tokenizer)
        self.weights = weights
        self.frozen_layers = frozen_layers
        self.lora = lora

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's (virtual) pipeline chunk and loads its share of the weights; once."""
        fresh = not hasattr(self, "module")
        super().configure_model(vp_stage=vp_stage)
        if not fresh:
            return
        load(self.module, self.weights, self.lora)
        if self.module.post_process:
            self.module.reward_head.requires_grad_(True)
        for parameter in global_parameters(unwrap(self.module)) if self.frozen_layers else ():
            layer = _LAYER.match(parameter.name)
            if parameter.name.startswith("embedding.") or (layer and int(layer[1]) < self.frozen_layers):
                parameter.parameter.requires_grad_(False)

    def forward(self, *args, **kwargs):
        """One packed row through this chunk: see ``RewardGPTModel.forward``."""
        return self.module(*args, **kwargs)


class RewardPasses(GroupPasses):
    """Passes over groups through ``RewardGPTModel`` chunks: the same rows as a policy's, the prompt computed once."""

    def rewards(self, chunks, groups, on_tokens=lambda tokens: None, alone: bool = False) -> torch.Tensor:
        """Rewards [G, N] (float64, on every rank; zero where a group has no such output): see ``logprobs``."""
        return self.logprobs(chunks, lengthened(groups), on_tokens=on_tokens, alone=alone)[0]

    def _pack(self, groups, chunks) -> MicroBatch:
        """The row with one target per output, the last."""
        batch = super()._pack(groups, chunks)
        last_K = torch.bincount(batch.output_of_target_T, minlength=len(batch.rows)).cumsum(0) - 1
        return replace(
            batch,
            target_positions_T=batch.target_positions_T[last_K],
            targets_T=batch.targets_T[last_K],
            output_of_target_T=torch.arange(len(batch.rows)),
        )


def lengthened(groups: list[Group]) -> list[Group]:
    """The groups with one token more per output: rows hold the tokens that predict, here those of the whole output."""
    return [
        replace(group, outputs=[replace(output, token_ids=[*output.token_ids, 0]) for output in group.outputs])
        for group in groups
    ]
