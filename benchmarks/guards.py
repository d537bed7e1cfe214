"""What a run's guards, metrics and reporting cost: their share of the training steps of a real run."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir

from benchmarks import common
from nemo_brain.report.metrics import MetricsWriter
from nemo_brain.training import frame
from nemo_brain.training.brain.loop import BRAInLoop
from nemo_brain.training.brain.passes import BRAInPasses
from nemo_brain.training.brain.run import run
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.callbacks import Driver

TITLE = "Guards, metrics and reporting"
METHOD = """
A whole run, TensorBoard included, with timers around what is neither forward, backward nor
optimizer: metrics of a step (metrics.jsonl, TensorBoard, progress bar). The guard against gradients that are not finite
compares the norm that clipping needs anyway, and is part of the optimizer's line. The share is of the wall time of the
training steps, from Lightning's start of a batch to the end of its callbacks; sampling and scoring are outside. What
NeMo and Lightning do around a step is a line of its own.
"""
TARGET = 0.01
_OUTSIDE = "sampling and scoring"  # the next iteration's groups are made at the end of a batch
_GUARDS = ("step metrics", "metrics files and TensorBoard")
RUNS = {
    "toy": ["trainer.max_iterations=4"],
    "20M": [
        "trainer.max_iterations=2",
        # Padded, so that embedding and output layer have the size of a real vocabulary's.
        "+model.gpt.make_vocab_size_divisible_by=16384",
        *(f"model.gpt.{key}={value}" for key, value in dict(num_layers=8, hidden_size=384, seq_length=256).items()),
        *(f"model.gpt.{key}={value}" for key, value in dict(num_attention_heads=6, ffn_hidden_size=1024).items()),
        "rollout.prompts_per_iteration=8",
        "rollout.max_new_tokens=48",
        "train.global_batch_size=4",
        "train.micro_batch_tokens=1024",
    ],
}


def measure(smoke: bool) -> dict:
    rows, targets = [], []
    for name, overrides in RUNS.items():
        if smoke and name != "toy":
            continue
        parts, steps = common.fresh(_run, [*overrides, "trainer.max_iterations=1"] if smoke else overrides)
        whole = sum(parts.values())
        for part, seconds in parts.items():
            row = {"model": name, "part": part, "milliseconds": 1e3 * seconds / steps, "share": seconds / whole}
            rows.append({**row, "guard": "yes" if part in _GUARDS else "", "steps": steps})
        share = sum(parts[guard] for guard in _GUARDS) / whole
        targets.append({"what": f"share of a step, {name}", "value": share, "at_most": TARGET, "unit": "percent"})
    columns = [
        ("model", "run", "text"),
        ("part", "part of a step", "text"),
        ("guard", "guard or report", "text"),
        ("milliseconds", "milliseconds per step", "number"),
        ("share", "share", "percent"),
        ("steps", "steps", "count"),
    ]
    return {"parts": [{"columns": columns, "rows": rows}], "targets": targets}


class _Clock(pl.Callback):
    """Wall seconds of all steps but the first, which pays for the first use of everything."""

    def __init__(self, watch: common.Stopwatch):
        self.watch = watch
        self.seconds, self.steps = 0.0, -1

    def on_train_batch_start(self, trainer, model, batch, batch_idx) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self.steps += 1
        if self.steps:
            self.seconds += time.perf_counter() - self._started
        else:
            self.watch.seconds = dict.fromkeys(self.watch.seconds, 0.0)


class _Optimizer(pl.Callback):
    """Times Megatron's optimizer, which exists once the run has begun."""

    def __init__(self, watch: common.Stopwatch):
        self.watch = watch

    def on_train_start(self, trainer, model) -> None:
        self.watch.watch(trainer.strategy.optimizers[0].mcore_optimizer, "step", "clipping and optimizer")


def _run(overrides: list[str]) -> tuple[dict[str, float], int]:
    with tempfile.TemporaryDirectory() as scratch, common.Stopwatch() as watch:
        with initialize_config_dir(str(common.ROOT / "conf"), version_base=None):
            data = ["data.holdout=0", "checkpoint.at_end=false"]
            config = compose("toy", overrides=[*data, f"run_dir={Path(scratch) / 'run'}", *overrides])
        watch.watch(Driver, "on_train_batch_end", _GUARDS[0])
        watch.watch(Driver, "on_before_optimizer_step", _GUARDS[0])
        watch.watch(MetricsWriter, "write", _GUARDS[1])
        watch.watch(frame, "write_samples", _GUARDS[1])
        watch.watch(BRAInLoop, "_make_rollout", _OUTSIDE)
        watch.watch(BRAInPasses, "train", "planning, forward, objective, backward")
        watch.watch(BRAInStrategy, "training_step", "clearing of gradients")
        clock = _Clock(watch)
        with contextlib.redirect_stdout(io.StringIO()):
            run(config, callbacks=[_Optimizer(watch), clock])
    parts = dict(watch.seconds)
    parts["around it: NeMo and Lightning"] = clock.seconds - sum(parts.values())
    del parts[_OUTSIDE]
    return parts, clock.steps
