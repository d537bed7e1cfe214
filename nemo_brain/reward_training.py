"""Trains a reward model: the strategy whose batches are preference pairs, and the loop of epochs over them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_brain.convert.export import export_model, make_export
from nemo_brain.convert.reward import RewardExport
from nemo_brain.data.preferences import Preference
from nemo_brain.metrics import MetricsWriter
from nemo_brain.preference_loss import PreferencePasses, PreferenceResult
from nemo_brain.preference_metrics import preference_metrics, preference_summary
from nemo_brain.progress import progress
from nemo_brain.reward_config import RewardConfig
from nemo_brain.strategy import PackedStrategy


@dataclass
class PreferenceStep:
    """One optimizer step on the pairs of a global batch (the same on every rank); ``result`` is filled in by it."""

    epoch: int
    pairs: Sequence[Preference]
    result: PreferenceResult | None = None


class PreferenceStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``PreferenceStep``s.

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

    def run_step(self, step: PreferenceStep) -> torch.Tensor:
        margins_P = torch.tensor([pair.margin for pair in step.pairs], dtype=torch.float64)
        step.result = self.passes.train(self.chunks, [pair.group for pair in step.pairs], margins_P, self._centering)
        return step.result.losses_P.mean()


class PreferenceLoop(pl.Callback):
    """Yields the run's ``PreferenceStep``s, records them, evaluates after each epoch and exports the model at the end.

    Args:
        config: the run's configuration.
        pairs: training pairs.
        held_out: evaluated after each epoch; none of them: no evaluation.
        run_dir: where rank 0 writes.
    """

    def __init__(
        self, config: RewardConfig, pairs: Sequence[Preference], held_out: Sequence[Preference], run_dir: Path
    ):
        self.config = config
        self.pairs = pairs
        self.held_out = held_out
        self.run_dir = run_dir
        self.step = 0
        self.summary: list[str] = []
        self._mean = 0.0
        # Batches of an epoch are of equal size, give or take one pair.
        self.steps_per_epoch = -(-len(pairs) // config.train.global_batch_size)

    def on_fit_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.strategy = trainer.strategy
        self.writer = None
        if trainer.is_global_zero:
            self.writer = MetricsWriter(self.run_dir, trainer.loggers, self.config.trainer.log_every_steps)

    def __iter__(self) -> Iterator[PreferenceStep]:
        count, steps = len(self.pairs), self.steps_per_epoch
        for epoch in range(self.config.trainer.epochs):
            order = _shuffled(count, f"{self.config.seed}/{epoch}")
            with progress(steps, f"epoch {epoch}: training", "steps") as self._bar:
                for index in range(steps):
                    members = order[index * count // steps : (index + 1) * count // steps]
                    self._current = PreferenceStep(epoch, [self.pairs[i] for i in members])
                    self._started = time.perf_counter()
                    yield self._current

    def on_before_optimizer_step(self, trainer, model, optimizer) -> None:
        # Read here: the scheduler has moved on by the end of the batch.
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        """Records the step that the optimizer has just made; after the epoch's last one, the evaluation."""
        step, result = self._current, self._current.result
        seconds = time.perf_counter() - self._started
        self.step += 1
        gap_P = result.rewards_P2[:, 0] - result.rewards_P2[:, 1]
        self._write(
            "step",
            {
                "epoch": step.epoch,
                "loss": result.losses_P.mean(),
                "accuracy": (gap_P.sign() + 1).mean() / 2,
                "reward_gap": gap_P.mean(),
                "grad_norm": trainer.callback_metrics.get("grad_norm"),
                "lr": self._lr,
                "tokens": result.tokens,
                "step_seconds": seconds,
                "tokens_per_second": result.tokens / seconds,
            },
        )
        self._bar.update(1)
        if self.held_out and self.step % self.steps_per_epoch == 0:
            self._evaluate(step.epoch)

    def on_train_end(self, trainer, model) -> None:
        """Exports the model. Not after fit: with CUDA, Lightning has moved the weights to the host by then."""
        directory = self.config.model.export_to
        if directory is None:
            return
        mean = self._mean if self.config.train.subtract_mean else 0.0
        export = make_export(model.config, model.weights.vocab_size, model.weights.tokenizer, "model.export_to")
        self.strategy.settle()
        export_model(self.strategy.chunks, RewardExport(export, mean, self.config.data.template), directory)

    def _evaluate(self, epoch: int) -> None:
        groups = [pair.group for pair in self.held_out]
        self.strategy.settle()
        with progress(None, "evaluation", "tokens") as bar:
            rewards_P2 = self.strategy.passes.rewards(self.strategy.chunks, groups, bar.update).numpy()
        record = {"epoch": epoch, **preference_metrics(rewards_P2)}
        self._mean = record["eval/reward"]
        self.summary = preference_summary(record)
        self._write("eval", record)

    def _write(self, kind: str, fields: dict) -> None:
        if self.writer:
            self.writer.write(kind, self.step, fields)


def _shuffled(size: int, key: str) -> list[int]:
    return sorted(range(size), key=lambda i: hashlib.sha256(f"{key}/{i}".encode()).digest())
