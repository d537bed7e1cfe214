"""The NeMo model class whose training step is BRAIn's."""

from __future__ import annotations

from typing import Any

from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.lora import LoRA
from nemo_brain.model.weights import Weights
from nemo_brain.objectives import Objective
from nemo_brain.training.nemo_model import PackedModel


class BRAInGPTModel(PackedModel):
    """``PackedModel`` trained by ``BRAInStrategy``; the start model is also the prior.

    Args:
        objective: makes the coefficients of a group's log-probs.
        config, weights, lora, optim: as in ``PackedModel``.
    """

    def __init__(
        self,
        config: PackedGPTConfig,
        weights: Weights,
        objective: Objective,
        lora: LoRA | None = None,
        optim: Any = None,
    ) -> None:
        super().__init__(config, weights, lora, optim)
        self.objective = objective
