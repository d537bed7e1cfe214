"""The NeMo model classes: a Megatron GPT over packed rows, and the one whose training step is BRAIn's."""

from __future__ import annotations

from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_brain.convert.weights import Weights
from nemo_brain.gpt import PackedGPTConfig
from nemo_brain.lora import LoRA, load
from nemo_brain.objectives import Objective


class PackedModel(GPTModel):
    """NeMo's GPTModel over packed rows, trained by a ``PackedStrategy``.

    Args:
        config: builds this rank's chunks.
        weights: what they are filled with: the start model.
        lora: the adapters to train in place of the weights; None: the weights are trained.
        optim: as in NeMo's GPTModel.
    """

    def __init__(self, config: PackedGPTConfig, weights: Weights, lora: LoRA | None = None, optim=None):
        super().__init__(config, optim=optim, tokenizer=weights.tokenizer)
        self.weights = weights
        self.lora = lora

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's (virtual) pipeline chunk and loads its share of the start weights; once."""
        fresh = not hasattr(self, "module")
        super().configure_model(vp_stage=vp_stage)
        if fresh:
            load(self.module, self.weights, self.lora)

    def forward(self, *args, **kwargs):
        """One packed row through this chunk: see ``PackedGPTModel.forward``."""
        return self.module(*args, **kwargs)


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
        optim=None,
    ):
        super().__init__(config, weights, lora, optim)
        self.objective = objective
