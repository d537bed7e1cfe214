"""Runs that are stopped and go on, and the comparison of their records with an undisturbed run."""

from __future__ import annotations

import functools
import logging
import os
import signal
import tempfile
from pathlib import Path

import pytest
from layouts import TIMINGS
from ranks import run_ranks
from toy_runs import toy_config

from nemo_brain.core.interruption import Interrupted
from nemo_brain.report.metrics import read_metrics
from nemo_brain.report.run_dir import LINE_FILES
from nemo_brain.training.brain.passes import BRAInPasses
from nemo_brain.training.brain.run import run

RUN = (
    "trainer.max_iterations=3",
    "trainer.val_every_iterations=2",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=4",
    "train.epochs_per_iteration=2",
    "data.holdout=4",
    "rollout.save=true",
    "optim.adam_eps=1e-3",  # as in test_parity: rounding of tiny gradients stays tiny in other layouts
    "optim.sched={name: WarmupPolicy, warmup_steps: 3, min_lr: 1e-3}",
    "model.gpt.num_layers=2",
)
STEPS = 12
# Not compared between layouts: packing, the sampler's own rounding, and lists of numbers.
INEXACT = {"tokens", "proposal_gap", "eval/reliability"}


def train(run_dir: str, *overrides: str, stop_after: int | None = None, by: signal.Signals = signal.SIGTERM) -> str:
    """One rank of a run; ``stop_after``: a signal comes in the middle of that step. Returns how it ended."""
    logging.disable(logging.WARNING)
    if stop_after is not None:
        signal_in_step(BRAInPasses, stop_after, by)
    try:
        run(toy_config(f"run_dir={run_dir}", *RUN, *overrides))
    except Interrupted as reason:
        return str(reason)
    return "finished"


def signal_in_step(passes: type, step: int, number: signal.Signals) -> None:
    """Rank 0 sends itself the signal in the middle of that optimizer step; ``passes``: those that it is made by."""
    original, calls = passes.train, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step and int(os.environ["RANK"]) == 0:
            os.kill(os.getpid(), number)  # one rank is told; all of them stop
        return original(self, *args, **kwargs)

    passes.train = counted


def records(run_dir: Path) -> list[dict]:
    """The metrics without times, in the order in which they stand in the file."""
    return [
        {name: value for name, value in record.items() if not name.endswith(TIMINGS)}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def written(run_dir: Path) -> dict[str, bytes]:
    """The other files that grow line by line."""
    return {name: (run_dir / name).read_bytes() for name in LINE_FILES[1:] if (run_dir / name).exists()}


@functools.cache
def undisturbed(*overrides: str, ranks: int = 1) -> tuple[list[dict], dict[str, bytes]]:
    """The records of a run that nothing happened to, and what it wrote line by line."""
    with tempfile.TemporaryDirectory() as scratch:
        assert run_ranks(train, ranks, f"{scratch}/run", "checkpoint.at_end=false", *overrides) == ["finished"] * ranks
        return records(Path(scratch, "run")), written(Path(scratch, "run"))


def compare(run_dir: Path, expected: list[dict], tolerance: float) -> None:
    found = records(run_dir)
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        compare_record(ours, theirs, tolerance)


def compare_record(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - (INEXACT if tolerance else set()):
        if tolerance and isinstance(theirs[name], float):
            absolute = 2e-5 if "kl_to_prior" in name else 1e-7  # as in test_parity
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=absolute), (theirs["step"], name)
        else:
            assert ours[name] == theirs[name], (theirs["step"], name)


def failure(run_dir: Path, *overrides: str, ranks: int = 1) -> str:
    with pytest.raises(AssertionError) as caught:
        run_ranks(train, ranks, str(run_dir), *overrides)
    return str(caught.value)
