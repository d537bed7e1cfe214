"""The NeMo model class of a reward model in training."""

from __future__ import annotations

import re
from typing import Any

from nemo_brain.model.lora import LoRA
from nemo_brain.model.parameters import global_parameters, unwrap
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.model.weights import Weights
from nemo_brain.training.nemo_model import PackedModel

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class RewardModel(PackedModel):
    """``PackedModel`` around ``RewardGPTModel`` chunks.

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
        optim: Any = None,
    ) -> None:
        super().__init__(config, weights, lora, optim)
        self.frozen_layers = frozen_layers

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's (virtual) pipeline chunk and loads its share of the weights; once."""
        fresh = not hasattr(self, "module")
        super().configure_model(vp_stage=vp_stage)
        if not fresh:
            return
        if self.module.post_process:
            self.module.reward_head.requires_grad_(True)
        for parameter in global_parameters(unwrap(self.module)) if self.frozen_layers else ():
            layer = _LAYER.match(parameter.name)
            if parameter.name.startswith("embedding.") or (layer and int(layer[1]) < self.frozen_layers):
                parameter.parameter.requires_grad_(False)
