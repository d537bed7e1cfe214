"""Trains a reward model: the strategy whose batches are preference pairs, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_brain.convert.export import Export
from nemo_brain.convert.reward import RewardExport
from nemo_brain.report.preferences import preference_metrics, preference_summary
from nemo_brain.report.progress import progress
from nemo_brain.training.epochs import EpochLoop, EpochStep
from nemo_brain.training.reward_model.passes import PreferencePasses, PreferenceResult
from nemo_brain.training.strategy import PackedStrategy


class PreferenceStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``EpochStep``s of ``Preference``s.

    Args:
        centering: the coefficient of ``preference_losses``.
        **options: PackedStrategy's own.
    """

    def __init__(self, *, centering: float, **options):
        super().__init__(**options)
        self._centering = centering

    def setup(self, trainer) -> None:
        """NeMo's, then the passes."""
        super().setup(trainer)
        self.passes = PreferencePasses(self.lightning_module.config, self.layout, self.micro_batch_tokens)

    def run_step(self, step: EpochStep) -> torch.Tensor:
        groups = [pair.group for pair in step.examples]
        margins_P = torch.tensor([pair.margin for pair in step.examples], dtype=torch.float64)
        step.result = self.passes.train(self.chunks, groups, margins_P, self._centering)
        return step.result.losses_P.mean()


class PreferenceLoop(EpochLoop):
    """``EpochLoop`` over ``Preference``s; the exported model subtracts the mean reward of the last evaluation."""

    def step_metrics(self, result: PreferenceResult) -> dict[str, Any]:
        gap_P = result.rewards_P2[:, 0] - result.rewards_P2[:, 1]
        return {
            "loss": result.losses_P.mean(),
            "accuracy": (gap_P.sign() + 1).mean() / 2,
            "reward_gap": gap_P.mean(),
        }

    def eval_metrics(self) -> dict[str, Any]:
        groups = [pair.group for pair in self.held_out]
        with progress(None, "evaluation", "tokens") as bar:
            rewards_P2 = self.strategy.passes.rewards(self.strategy.chunks, groups, bar.update).numpy()
        return preference_metrics(rewards_P2)

    def eval_summary(self, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        return preference_summary(record)

    def make_export(self, model: pl.LightningModule) -> Export:
        subtracted = self._evaluation is not None and self.config.train.subtract_mean
        mean = self._evaluation["eval/reward"] if subtracted else 0.0
        return RewardExport(super().make_export(model), mean, self.config.data.template)
