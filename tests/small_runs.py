"""Runs of the toy on one process, one step per iteration on all of its 8 groups."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from ranks import run_ranks
from toy_runs import toy_config

from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.run import run

# One step per iteration on all of its 8 groups.
SMALL = (
    "trainer.max_iterations=2",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=2",
    "train.global_batch_size=8",
    "train.epochs_per_iteration=1",
)
NO_VALIDATION = "data.holdout=0"


class LearningRates(pl.Callback):
    """The learning rate with which each optimizer step is made."""

    def __init__(self):
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.used.append(trainer.optimizers[0].param_groups[0]["lr"])


def train(run_dir: Path, *overrides: str) -> list[float]:
    """A run on one process; returns the learning rates that the optimizer had."""

    def rank() -> list[float]:
        rates = LearningRates()
        run(toy_config(*SMALL, f"run_dir={run_dir}", *overrides), callbacks=[rates])
        return rates.used

    (used,) = run_ranks(rank, 1)
    return used


def records(run_dir: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind]
