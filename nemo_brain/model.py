"""The NeMo model class: a Megatron GPT whose training step is BRAIn's."""

from __future__ import annotations

from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_brain.convert.weights import Weights
from nemo_brain.gpt import PackedGPTConfig
from nemo_brain.lora import LoRA, load
from nemo_brain.objectives import Objective


class BRAInGPTModel(GPTModel):
    """NeMo's GPTModel over packed rows of groups, trained by ``BRAInStrategy``.

    Args:
        config: builds this rank's chunks.
        weights: what they are filled with: the start model, which is also the prior.
        objective: makes the coefficients of a group's log-probs.
        lora: the adapters to train in place of the weights; None: the weights are trained.
        optim, tokenizer: as in NeMo's GPTModel; the tokenizer is a transformers one.
    """

    def __init__(
        self,
        config: PackedGPTConfig,
        weights: Weights,
        objective: Objective,
        lora: LoRA | None = None,
        optim=None,
        tokenizer=None,
    ):
        super().__init__(config, optim=optim, tokenizer=tokenizer)
        self.weights = weights
        self.objective = objective
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
