"""Training by epochs over fixed examples: their order, progress, records, evaluations, and the export at the end.

``EpochLoop`` is the training data of the Lightning trainer, and a callback that records each step once the optimizer is
done, as ``loop.BRAInLoop`` is for iterations. Every rank holds all examples.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.collections.llm.gpt.model.base import GPTModel
from omegaconf import DictConfig, OmegaConf

from nemo_brain.config.common import TrainingConfig
from nemo_brain.convert.export import Export, export_model, make_export
from nemo_brain.data.order import shuffled
from nemo_brain.report.metrics import MetricsWriter, prepare_run_dir
from nemo_brain.report.progress import duration, number, progress
from nemo_brain.training.build import make_trainer
from nemo_brain.training.strategy import PackedStrategy


@dataclass
class EpochStep:
    """One optimizer step on the examples of a global batch (the same on every rank); ``result`` is filled in by it."""

    epoch: int
    examples: Sequence[Any]
    result: Any = None


class EpochLoop(pl.Callback):
    """Yields the run's ``EpochStep``s, records them, evaluates after each epoch and exports the model at the end.

    A subclass says what is recorded of a step and of the held-out examples, and may change how the model is written.

    Args:
        config: the run's configuration.
        examples: of the training.
        held_out: evaluated after each epoch; none of them: no evaluation.
    """

    evaluates_start = False  # whether the held-out examples are also evaluated before the first step

    def __init__(self, config: TrainingConfig, examples: Sequence[Any], held_out: Sequence[Any]):
        self.config = config
        self.examples = examples
        self.held_out = held_out
        self.run_dir = Path(config.run_dir)
        self.step = 0
        self._evaluation: Mapping[str, Any] | None = None  # the last one's record
        self._seconds, self._tokens = 0.0, 0  # of all steps so far
        # Batches of an epoch are of equal size, give or take one example.
        self.steps_per_epoch = -(-len(examples) // config.train.global_batch_size)

    def step_metrics(self, result: Any) -> dict[str, Any]:
        """What is recorded of a step, besides what every training records."""
        raise NotImplementedError

    def eval_metrics(self) -> dict[str, Any]:
        """The metrics of the held-out examples. All ranks call it together."""
        raise NotImplementedError

    def eval_summary(self, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The last evaluation in rows of a name and a text."""
        raise NotImplementedError

    def make_export(self, model: pl.LightningModule) -> Export:
        """How the model is written to ``model.export_to``."""
        return make_export(model.config, model.weights.vocab_size, model.weights.tokenizer, "model.export_to")

    def on_fit_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.strategy = trainer.strategy
        self.writer = None
        if trainer.is_global_zero:
            self.writer = MetricsWriter(self.run_dir, trainer.loggers, self.config.trainer.log_every_steps)

    def __iter__(self) -> Iterator[EpochStep]:
        if self.held_out and self.evaluates_start:
            self._evaluate(None)
        count, steps = len(self.examples), self.steps_per_epoch
        for epoch in range(self.config.trainer.epochs):
            order = shuffled(count, f"{self.config.seed}/{epoch}")
            with progress(steps, f"epoch {epoch}: training", "steps") as self._bar:
                for index in range(steps):
                    members = order[index * count // steps : (index + 1) * count // steps]
                    self._current = EpochStep(epoch, [self.examples[i] for i in members])
                    self._started = time.perf_counter()
                    yield self._current

    def on_before_optimizer_step(self, trainer, model, optimizer) -> None:
        # Read here: the scheduler has moved on by the end of the batch.
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        """Records the step that the optimizer has just made; after the epoch's last one, the evaluation."""
        step = self._current
        seconds = time.perf_counter() - self._started
        self.step += 1
        self._seconds += seconds
        self._tokens += step.result.tokens
        self._write(
            "step",
            {
                "epoch": step.epoch,
                **self.step_metrics(step.result),
                "grad_norm": trainer.callback_metrics.get("grad_norm"),
                "lr": self._lr,
                "tokens": step.result.tokens,
                "step_seconds": seconds,
                "tokens_per_second": step.result.tokens / seconds,
            },
        )
        self._bar.update(1)
        if any(guard.skipped for guard in self.strategy.guards):
            raise ValueError(
                f"the gradient of step {self.step} is not finite, the training stops there: lower optim.lr"
            )
        if self.held_out and self.step % self.steps_per_epoch == 0:
            self._evaluate(step.epoch)

    def on_train_end(self, trainer, model) -> None:
        """Exports the model. Not after fit: with CUDA, Lightning has moved the weights to the host by then."""
        directory = self.config.model.export_to
        if directory is not None:
            self.strategy.settle()
            export_model(self.strategy.chunks, self.make_export(model), directory)

    @property
    def summary(self) -> list[str]:
        """The end of the training in lines of text."""
        rows = [] if self._evaluation is None else self.eval_summary(self._evaluation)
        speed = f"{number(self._tokens / self._seconds)} tokens/s"
        rows.append(("training", f"{self.step} steps in {duration(self._seconds)}, {speed}"))
        if self.config.model.export_to is not None:
            rows.append(("model", self.config.model.export_to))
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {text}" for name, text in rows]

    def _evaluate(self, epoch: int | None) -> None:
        """``epoch``: the one that has just ended; None before the first."""
        self.strategy.settle()
        self._evaluation = {"epoch": epoch, **self.eval_metrics()}
        self._write("eval", self._evaluation)

    def _write(self, kind: str, fields: Mapping[str, Any]) -> None:
        if self.writer:
            self.writer.write(kind, self.step, fields)


def train_epochs(
    cfg: DictConfig,
    model: GPTModel,
    strategy: PackedStrategy,
    loop: EpochLoop,
    callbacks: Sequence[pl.Callback],
) -> None:
    """Clears the run directory and trains; rank 0 writes the configuration ``cfg`` and prints the summary."""
    rank_zero = int(os.environ.get("RANK", 0)) == 0
    if rank_zero:
        prepare_run_dir(loop.run_dir)
        (loop.run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    steps = loop.config.trainer.epochs * loop.steps_per_epoch
    config = loop.config
    trainer = make_trainer(config.trainer, config.logger, loop.run_dir, strategy, steps, [loop, *callbacks])
    trainer.fit(model, train_dataloaders=loop)
    if rank_zero:
        print("\n".join(loop.summary))
