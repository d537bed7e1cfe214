"""A run's directory: made, locked, cleared for a new run, and taken back to where a checkpoint was written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

# What a run leaves in its directory, by pattern; anything else there is the user's and is never moved.
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
    "rollouts",
    "failed_rollout.jsonl",
    "nonfinite_*.jsonl",
    "report.html",
    "checkpoints",
    "status.json",
    "stacks",
    "tensorboard",
    "wandb",
    "mlflow",
    "mlflow_run.json",
)
# Those that grow line by line.
LINE_FILES = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")
STATUS = "status.json"


def prepare_run_dir(path: str | Path, resume: bool = False) -> Path:
    """Creates the run directory, or clears it for a new run: an earlier run's files move to ``previous/<k>/``.

    To be called by rank 0 alone, before anything is written there. With ``resume`` the earlier files stay, to be
    continued.

    Raises:
        ValueError: naming ``run_dir``, if it cannot be created or written.
    """
    run_dir = Path(path)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        earlier = [file for pattern in RUN_FILES for file in run_dir.glob(pattern)]
        if earlier and not resume:
            taken = [int(p.name) for p in (run_dir / "previous").glob("*") if p.name.isdecimal()]
            attic = run_dir / "previous" / str(max(taken, default=0) + 1)
            attic.mkdir(parents=True)
            for file in earlier:
                file.rename(attic / file.name)
    return run_dir


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Makes the run directory, and keeps other runs out of it while the context lasts; a killed process leaves it free.
    For rank 0.

    Raises:
        ValueError: naming ``run_dir``: another run is in it, or it cannot be written.
    """
    run_dir = Path(path)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run_dir={run_dir}: another run is writing there; name another directory") from None
        yield


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Around writing to a file of the run directory. ValueError, naming ``run_dir``: it failed."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"run_dir={run_dir}: cannot write there ({error.strerror or error}); set run_dir to a directory that you "
            "may write to, with room for checkpoints"
        ) from error


def write_status(run_dir: Path, state: str, step: int) -> None:
    """``running``, ``interrupted``, ``finished`` or ``failed``: what a requeue script and the next run look at."""
    temporary = run_dir / f".{STATUS}"
    temporary.write_text(json.dumps({"state": state, "step": step}) + "\n", encoding="utf-8")
    temporary.rename(run_dir / STATUS)


def read_status(run_dir: Path) -> dict:
    """What ``write_status`` wrote last; {} if there is nothing to be read."""
    try:
        return json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def line_file_sizes(run_dir: Path) -> dict[str, int]:
    """The sizes in bytes of the files that grow line by line: a checkpoint keeps them for ``rewind``."""
    return {name: (run_dir / name).stat().st_size for name in LINE_FILES if (run_dir / name).exists()}


def rewind(run_dir: Path, sizes: Mapping[str, int]) -> None:
    """Cuts off what was written after a checkpoint: the run that goes on from it writes that again.

    Raises:
        ValueError: naming ``run_dir``, if it cannot be written.
    """
    with writing(run_dir):
        for name in LINE_FILES:
            path = run_dir / name
            if path.exists() and path.stat().st_size > sizes.get(name, 0):
                os.truncate(path, sizes.get(name, 0))
