"""Lightning's side of a training: it asks for batches and calls back after each optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from nemo_brain.report.run_dir import write_status
from nemo_brain.training.frame import Batch, Frame, Loop, Outcome, Steps


class Driver(pl.Callback):
    """Gives a trainer the batches of a loop, as its training data, and the loop what came of each.

    Args:
        frame: of the training.
        loop: its kind.
    """

    def __init__(self, frame: Frame, loop: Loop):
        self._frame = frame
        self._loop = loop
        self._steps: Steps | None = None
        self._batch: Batch | None = None
        self._started = 0.0
        self._lr = 0.0
        self._skipped = 0

    def __deepcopy__(self, memo: dict) -> Driver:
        """NeMo's trainer keeps a copy of what it is made from: not of the training itself, its data and open files."""
        return self

    def __iter__(self) -> Iterator[Batch]:
        while self._batch is not None:
            self._started = time.perf_counter()
            yield self._batch

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._frame.interruption.listen()  # Lightning has installed its own handlers by now
        if (path := self._frame.strategy.resumed_from) is not None:
            self._frame.restore(path)
        if self._frame.writer:
            write_status(self._frame.run_dir, "running", self._frame.state.step)
        self._steps = self._loop.steps()
        self._advance(trainer, None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        # Read here: the scheduler has moved on by the end of the batch.
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seconds = time.perf_counter() - self._started
        strategy = self._frame.strategy
        skipped = sum(guard.skipped for guard in strategy.guards)
        norm = trainer.callback_metrics.get("grad_norm")
        outcome = Outcome(strategy.last_result, norm, self._lr, seconds, skipped > self._skipped)
        self._skipped = skipped
        self._advance(trainer, outcome)

    def _advance(self, trainer: pl.Trainer, outcome: Outcome | None) -> None:
        """The loop goes on to its next step, or ends, and the training with it."""
        assert self._steps is not None
        try:
            self._batch = next(self._steps) if outcome is None else self._steps.send(outcome)
        except StopIteration:
            self._batch = None
            trainer.should_stop = True
