"""What a checkpoint costs: its size, how long training stands still for it, and when it is complete."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from benchmarks import common
from benchmarks.guards import RUNS
from nemo_brain.durability import checkpoint
from nemo_brain.durability.saving import Checkpointer
from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.run import run

TITLE = "Checkpoints"
METHOD = """
A run that saves after every second step: weights, fp32 Adam states, the rollout, random states,
synced to the disk and checksummed. Runs without checkpoints, with `checkpoint.async_save=false` and with `true` took
turns in fresh processes; the first save of each is left out. Training stands still for the whole of a save, or, with
`async_save`, for the copy, and for what is left of the checkpoint before. Steps are counted without their saves; in the
asynchronous runs a checkpoint is being written during them. The plain write is a sequential one, with a sync, of as
many bytes to the same disk.
"""
_MODES = {"none": None, "synchronous": "false", "asynchronous": "true"}  # and checkpoint.async_save


def measure(smoke: bool) -> dict:
    rows = []
    for name, overrides in RUNS.items():
        if smoke and name != "toy":
            continue
        found: dict[str, list[dict]] = {mode: [] for mode in _MODES}
        for _ in range(1 if smoke else 3):
            for mode, results in found.items():
                results.append(common.fresh(_run, overrides, mode))
        base = [step for result in found["none"] for step in result["steps"]]
        for mode, results in found.items():
            steps = [step for result in results for step in result["steps"]]
            row = {"run": name, "mode": mode, "step": common.spread(steps)}
            row["slower"] = row["step"]["median"] / common.spread(base)["median"]
            if mode != "none":
                for part in ("still", "complete", "plain"):
                    row[part] = common.spread([value for result in results for value in result[part]])
                row["bytes"] = results[0]["bytes"]
            rows.append(row)
    columns = [
        ("run", "run", "text"),
        ("mode", "checkpoints", "text"),
        ("bytes", "size", "bytes"),
        ("still", "training stands still, s", "seconds"),
        ("complete", "complete after, s", "seconds"),
        ("plain", "plain write of as much, s", "seconds"),
        ("step", "step, s", "seconds"),
        ("slower", "step / without", "number"),
    ]
    return {"parts": [{"columns": columns, "rows": rows}], "targets": []}


def _run(overrides: list[str], mode: str) -> dict:
    still: list[float] = []
    complete: list[float] = []
    begun: list[float] = []
    save, write = Checkpointer.save, Checkpointer._write

    def timed_save(self, *args) -> None:
        begun.append(time.perf_counter())
        save(self, *args)
        still.append(time.perf_counter() - begun[-1])

    def timed_write(self, *args) -> None:
        write(self, *args)
        complete.append(time.perf_counter() - begun[-1])

    Checkpointer.save, Checkpointer._write = timed_save, timed_write
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        with initialize_config_dir(str(common.ROOT / "conf"), version_base=None):
            data = ["data.holdout=0", f"run_dir={run_dir}"]
            saving = ["checkpoint.every_minutes=null", "checkpoint.at_end=false"]
            if mode != "none":
                saving += ["checkpoint.every_steps=2", f"checkpoint.async_save={_MODES[mode]}"]
            config = compose("toy", overrides=[*data, *saving, "logger.tensorboard=false", *overrides])
        with contextlib.redirect_stdout(io.StringIO()):
            run(config)
        steps = [r["step_seconds"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "step"][1:]
        if mode == "none":
            return {"steps": steps}
        newest = checkpoint.complete(run_dir / "checkpoints")[0]
        size = sum(file.stat().st_size for file in checkpoint.files_of(newest))
        plain = [_plain_write(Path(scratch) / "plain", size) for _ in still[1:]]
        return {"steps": steps, "still": still[1:], "complete": complete[1:], "plain": plain, "bytes": size}


def _plain_write(path: Path, size: int) -> float:
    block = os.urandom(min(size, 1 << 24))
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds
