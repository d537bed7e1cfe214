"""Trainings by epochs on toy data, stopped and gone on with: fine-tuning and reward models alike."""

from __future__ import annotations

import functools
import logging
import signal
import tempfile
from pathlib import Path

from demonstrations import sft_config, write_demonstrations
from ranks import run_ranks
from resumed_runs import records, signal_in_step, written
from reward_runs import TOY, reward_config, write_pairs

from nemo_brain.core.interruption import Interrupted
from nemo_brain.training.reward_model.passes import PreferencePasses
from nemo_brain.training.reward_model.run import train_reward_model
from nemo_brain.training.sft.passes import CompletionPasses
from nemo_brain.training.sft.run import fine_tune

KINDS = ("sft", "reward_model")
# 3 epochs of 4 steps on 28 examples, 4 held out.
RUN = (
    "trainer.epochs=3",
    "train.global_batch_size=7",
    "data.holdout=4",
    "validation.samples=3",
    # Slow, so that no loss vanishes: layouts agree to 1e-5 of what is not itself a rounding error.
    "optim.lr=3e-4",
    "optim.sched={name: WarmupPolicy, warmup_steps: 3, min_lr: 1e-4}",
    "model.gpt.num_layers=2",
)
STEPS = 12
# Written once, in the test process: its forks have the same path.
_FOLDER = tempfile.TemporaryDirectory(prefix="examples")
_EXAMPLES = {
    "sft": write_demonstrations(Path(_FOLDER.name, "demonstrations.jsonl")),
    "reward_model": write_pairs(Path(_FOLDER.name, "pairs.jsonl")),
}


def train(
    kind: str, run_dir: str, *overrides: str, stop_after: int | None = None, by: signal.Signals = signal.SIGTERM
) -> str:
    """One rank of a training; ``stop_after``: a signal comes in the middle of that step. Returns how it ended."""
    logging.disable(logging.WARNING)
    if stop_after is not None:
        signal_in_step(CompletionPasses if kind == "sft" else PreferencePasses, stop_after, by)
    options = (f"run_dir={run_dir}", f"data.train={_EXAMPLES[kind]}", *RUN, *overrides)
    try:
        if kind == "sft":
            toy = [option for option in TOY if not option.startswith("model.head_std")]
            fine_tune(sft_config(*toy, *options))
        else:
            train_reward_model(reward_config(*TOY, "train.centering=0.1", *options))
    except Interrupted as reason:
        return str(reason)
    return "finished"


@functools.cache
def undisturbed(kind: str, *overrides: str, ranks: int = 1) -> tuple[list[dict], dict[str, bytes]]:
    """The records of a training that nothing happened to, and what it wrote line by line."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = f"{scratch}/run"
        assert run_ranks(train, ranks, kind, run_dir, "checkpoint.at_end=false", *overrides) == ["finished"] * ranks
        return records(Path(run_dir)), written(Path(run_dir))
