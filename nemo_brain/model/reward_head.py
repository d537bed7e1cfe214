"""A Megatron GPT with a scalar head instead of an output layer: the reward of an output is read at its last token.

Shapes: S positions of a row, K outputs of a micro-batch, H hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from nemo_brain.model.gpt import PackedGPTConfig, PackedGPTModel
from nemo_brain.model.parameters import is_adapter

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

    def __init__(self, **options: Any) -> None:
        # Tied, the last stage would hold a copy of the embedding and sum its gradient with the first stage's.
        super().__init__(**{**options, "share_embeddings_and_output_weights": False})
        if self.post_process:
            del self.output_layer
            self.reward_head = RewardHead(self.config)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's for any module, for its GPT's wants an output layer; with adapters, theirs and the head's part.

        Each layer has its own tensors: of frozen ones the optimizer has none, which a tensor of all could not lack.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        if not any(map(is_adapter, state)):
            return state
        return {key: value for key, value in state.items() if is_adapter(key) or key.endswith(HEAD)}

    def forward(  # type: ignore[override]
        self,
        tokens_1S: torch.Tensor,
        positions_1S: torch.Tensor,
        attention: Any,
        select_K: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
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
        return self.reward_head(hidden.squeeze(1).index_select(0, select_K))[None]


@dataclass
class RewardGPTConfig(PackedGPTConfig):
    """A NeMo GPTConfig that builds a ``RewardGPTModel``."""

    model_class = RewardGPTModel
