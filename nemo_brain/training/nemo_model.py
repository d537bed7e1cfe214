"""The NeMo model class of every training: a Megatron GPT over packed rows."""

from __future__ import annotations

from typing import Any

import fiddle as fdl
from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.lora import LoRA, load
from nemo_brain.model.weights import Weights


class PackedModel(GPTModel):
    """NeMo's GPTModel over packed rows, trained by a ``PackedStrategy``.

    Args:
        config: builds this rank's chunks.
        weights: what they are filled with: the start model.
        lora: the adapters to train in place of the weights; None: the weights are trained.
        optim: as in NeMo's GPTModel.
    """

    def __init__(self, config: PackedGPTConfig, weights: Weights, lora: LoRA | None = None, optim: Any = None) -> None:
        super().__init__(config, optim=optim, tokenizer=weights.tokenizer)
        self.weights = weights
        self.lora = lora
        self.load_errors: list[Exception] = []  # for the strategy, which raises them where all ranks have met

    def reinit(self) -> Any:
        """This model anew, for NeMo's next virtual stage, with the configuration itself.

        NeMo would make it from what the configuration was first given, without the layout that its strategy has set.
        """
        other: Any = fdl.build(self.__io__)
        other.config = self.config
        return other

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's (virtual) pipeline chunk and loads its share of the start weights; once.

        Other ranks build theirs meanwhile, and wait for each other: an error of the weights is kept in ``load_errors``.
        """
        fresh = not hasattr(self, "module")
        super().configure_model(vp_stage=vp_stage)
        if fresh:
            try:
                load(self.module, self.weights, self.lora)
            except ValueError as error:
                self.load_errors.append(error)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One packed row through this chunk: see ``PackedGPTModel.forward``."""
        return self.module(*args, **kwargs)
