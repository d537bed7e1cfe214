"""Trains a reward model: the strategy whose batches are preference pairs, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_brain.config.reward_model import RewardConfig
from nemo_brain.core.groups import RewardedGroup
from nemo_brain.data.preferences import Preference
from nemo_brain.report.preferences import preference_metrics
from nemo_brain.report.progress import progress
from nemo_brain.training.epochs import EpochLoop, EpochState, EpochStep
from nemo_brain.training.frame import Frame
from nemo_brain.training.reward_model.passes import PreferencePasses, PreferenceResult
from nemo_brain.training.strategy import PackedStrategy


class PreferenceStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``EpochStep``s of ``Preference``s.

    Args:
        centering: the coefficient of ``preference_losses``.
        **options: PackedStrategy's own.
    """

    def __init__(self, *, centering: float, **options: Any):
        super().__init__(**options)
        self._centering = centering
        self._passes: PreferencePasses | None = None

    def setup(self, trainer: pl.Trainer) -> None:
        """PackedStrategy's, then the passes."""
        super().setup(trainer)
        self._passes = PreferencePasses(self.lightning_module.config, self.layout, self.micro_batch_tokens)

    @property
    def passes(self) -> PreferencePasses:
        assert self._passes is not None, "the strategy has not been set up"
        return self._passes

    def run_step(self, batch: EpochStep[Preference]) -> PreferenceResult:
        margins_P = torch.tensor([pair.margin for pair in batch.examples], dtype=torch.float64)
        return self.passes.train(self.chunks, batch.groups, margins_P, self._centering)


class PreferenceLoop(EpochLoop[Preference]):
    """``EpochLoop`` over ``Preference``s."""

    def __init__(
        self,
        config: RewardConfig,
        frame: Frame[EpochState],
        strategy: PreferenceStrategy,
        examples: Sequence[Preference],
        held_out: Sequence[Preference],
    ):
        super().__init__(config, frame, examples, held_out)
        self.strategy = strategy

    def step_metrics(self, result: PreferenceResult) -> dict[str, Any]:
        gap_P = result.rewards_P2[:, 0] - result.rewards_P2[:, 1]
        return {
            "loss": result.loss,
            "accuracy": (gap_P.sign() + 1).mean() / 2,
            "reward_gap": gap_P.mean(),
        }

    def eval_metrics(self) -> dict[str, Any]:
        with progress(None, "evaluation", "tokens") as bar:
            rewards_P2 = self._rewards(self.held_out, bar.update)
        return preference_metrics(rewards_P2.numpy())

    def score(self, metrics: Any) -> float:
        return -metrics["eval/log_loss"]

    def shown_groups(self) -> Sequence[RewardedGroup]:
        """The chosen and the rejected output of each, with their rewards."""
        chosen = self.held_out[: self.config.validation.samples]
        rewards_P2 = self._rewards(chosen, lambda tokens: None).tolist()
        return [
            RewardedGroup(pair.group.prompt, pair.group.outputs, rewards=rewards)
            for pair, rewards in zip(chosen, rewards_P2, strict=True)
        ]

    def _rewards(self, pairs: Sequence[Preference], on_tokens: Callable[[int], None]) -> torch.Tensor:
        return self.strategy.passes.rewards(self.strategy.chunks, [pair.group for pair in pairs], on_tokens)
