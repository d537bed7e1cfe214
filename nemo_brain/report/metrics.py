"""The files of a run directory: metrics.jsonl and samples.jsonl, written line by line so that a killed run keeps them.

Every line is one standard JSON object in UTF-8; NaN and infinities are null. A resumed run may write a step again:
readers take the last record of a step or iteration.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_brain.core.groups import Group

KINDS = ("step", "iteration", "eval")
SAMPLE_KINDS = ("start", "train", "validation", "final")
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
)


class MetricsWriter:
    """Appends records to ``run_dir``/metrics.jsonl, one flushed line each. For rank 0 only.

    Args:
        run_dir: an existing directory, see ``prepare_run_dir``.
        loggers: Lightning loggers (TensorBoard, W&B); they receive every finite number with the optimizer step.
        log_every_steps: of step records the loggers receive only every so many.
    """

    def __init__(self, run_dir: str | Path, loggers: Iterable[Any] = (), log_every_steps: int = 1):
        self._path = Path(run_dir) / "metrics.jsonl"
        self._loggers = list(loggers)
        self._log_every_steps = log_every_steps
        _drop_cut_line(self._path)
        self._file = self._path.open("ab")

    def write(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Appends ``{"kind", "step", **fields}``.

        Args:
            kind: ``step``, ``iteration`` or ``eval``.
            step: optimizer steps done so far in the whole run: the loggers' x axis.
            fields: the record's metrics, ``iteration`` among them: numbers, strings, None, or scalar tensors.

        Raises:
            ValueError: naming ``run_dir``, if it cannot be written: a full disk.
        """
        assert kind in KINDS, kind
        record = {"kind": kind, "step": step} | {name: _plain(value) for name, value in fields.items()}
        with writing(self._path.parent):
            self._file.write(_lines([record]))
            self._file.flush()
        if kind == "step" and step % self._log_every_steps:
            return
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for logger in self._loggers:
            logger.log_metrics(numbers, step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; [] if there is no such file yet. A cut last line is left out.

    Raises:
        ValueError: with file and line, if any other line is not a JSON object.
    """
    return _read(Path(path), lambda record: (record.get("kind"), record.get("step"), record.get("iteration")))


def write_samples(
    run_dir: str | Path,
    iteration: int,
    groups: Sequence[Group],
    kind: str,
    alpha: Sequence[Sequence[float]] | None = None,
) -> None:
    """Appends groups to ``run_dir``/samples.jsonl, one line each:
    ``{"iteration", "kind", "id", "prompt", "reference", "outputs": [{"text", "reward", "weight"}]}``.

    Args:
        kind: ``start`` (the start model on held-out prompts), ``train`` (a rollout), ``validation`` or ``final``.
        alpha: each output's self-normalised weight, [groups][outputs]: lists or a tensor; rows may be padded.
    """
    assert kind in SAMPLE_KINDS, kind
    path = Path(run_dir) / "samples.jsonl"
    _drop_cut_line(path)
    records = [
        {
            "iteration": iteration,
            "kind": kind,
            "id": group.prompt.id,
            "prompt": group.prompt.text,
            "reference": group.prompt.reference,
            "outputs": [
                {
                    "text": output.text,
                    "reward": _plain(output.reward),
                    "weight": None if alpha is None else _plain(alpha[g][i]),
                }
                for i, output in enumerate(group.outputs)
            ],
        }
        for g, group in enumerate(groups)
    ]
    with writing(path.parent), path.open("ab") as file:
        file.write(_lines(records))


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The groups of a samples.jsonl, in order; as tolerant as ``read_metrics``."""
    return _read(Path(path), lambda record: (record.get("kind"), record.get("iteration"), record.get("id")))


def prepare_run_dir(path: str | Path, resume: bool = False) -> Path:
    """Creates the run directory, or clears it for a new run: an earlier run's files move to ``previous/<k>/``.

    To be called by rank 0 alone, before anything is written there. With ``resume`` the earlier files stay, to be
    continued.

    Raises:
        ValueError: naming ``run_dir``, if it cannot be created or written.
    """
    run_dir = Path(path)
    try:
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
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    return run_dir


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Makes the run directory, and keeps other runs out of it while the context lasts; a killed process leaves it free.
    For rank 0.

    Raises:
        ValueError: naming ``run_dir``: another run is in it, or it cannot be written.
    """
    run_dir = Path(path)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise _unwritable(run_dir, error) from error
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
        raise _unwritable(run_dir, error) from error


def _unwritable(run_dir: Path, error: OSError) -> ValueError:
    return ValueError(
        f"run_dir={run_dir}: cannot write there ({error.strerror or error}); set run_dir to a directory that you may "
        "write to, with room for checkpoints"
    )


@dataclass(frozen=True)
class RunSummary:
    """A run in a few numbers: what the final summary and the head of the report show.

    ``start`` and ``last`` are eval records (None before the first); seconds are sums over iterations, and
    ``train_tokens_per_second`` is the tokens of all optimizer steps over the seconds of these steps.
    """

    iterations: int
    steps: int
    start: dict[str, Any] | None
    last: dict[str, Any] | None
    sample_seconds: float
    score_seconds: float
    train_seconds: float
    train_tokens_per_second: float | None
    peak_memory_gib: float | None


def summarize(records: Sequence[Mapping[str, Any]]) -> RunSummary:
    """Sums up the records of a metrics.jsonl; works on the records of an unfinished run, or on none."""
    by_kind = {kind: [dict(r) for r in records if r.get("kind") == kind] for kind in KINDS}
    evals = by_kind["eval"]

    def total(kind: str, name: str) -> float:
        return sum(r.get(name) or 0.0 for r in by_kind[kind])

    step_seconds = total("step", "step_seconds")
    memory = [r["peak_memory_gib"] for r in by_kind["iteration"] if r.get("peak_memory_gib") is not None]
    return RunSummary(
        iterations=len(by_kind["iteration"]),
        steps=len(by_kind["step"]),
        start=evals[0] if evals else None,
        last=evals[-1] if evals else None,
        sample_seconds=total("iteration", "sample_seconds"),
        score_seconds=total("iteration", "score_seconds"),
        train_seconds=total("iteration", "train_seconds"),
        train_tokens_per_second=total("step", "tokens") / step_seconds if step_seconds else None,
        peak_memory_gib=max(memory, default=None),
    )


def _plain(value: Any) -> Any:
    """A JSON value: scalar tensors and numpy numbers as Python's, non-finite floats as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    # A lone surrogate of a byte tokenizer must not stop the run.
    return text.encode("utf-8", errors="replace")


def _drop_cut_line(path: Path) -> None:
    """Cuts off an unfinished last line, as a killed run leaves it, so that the next record has a line of its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _read(path: Path, key: Callable[[dict[str, Any]], tuple]) -> list[dict[str, Any]]:
    """The lines' objects; of several with one key the last, where the first stood."""
    if not path.exists():
        return []
    # Lines end at b"\n" alone: str.splitlines would also cut at the separators that outputs may contain.
    lines = path.read_bytes().split(b"\n")
    records: dict[tuple, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: {error}; remove the line to read the rest of the file") from error
        records[key(record)] = record
    return list(records.values())
