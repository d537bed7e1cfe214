"""The files of a run directory: metrics.jsonl and samples.jsonl, written line by line so that a killed run keeps them.

Every line is one standard JSON object in UTF-8; NaN and infinities are null. A run that goes on from a checkpoint first
cuts off what was written after it (``run_dir.rewind``), so every step is there once.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from nemo_brain.core.groups import Group
from nemo_brain.report.run_dir import writing

KINDS = ("step", "iteration", "eval")
COLUMNS = ["id", "prompt", "reference", "output", "reward", "weight"]  # of a table of samples
SAMPLE_KINDS = ("start", "train", "validation", "final")


class MetricsWriter:
    """Appends records to ``run_dir``/metrics.jsonl, one flushed line each. For rank 0 only.

    Args:
        run_dir: an existing directory, see ``prepare_run_dir``.
        loggers: Lightning loggers (TensorBoard, W&B) and the like (``MLflowLogger``); they receive every finite number
            with the optimizer step, and those with ``log_table`` the samples. One that fails gets nothing more, with a
            warning: what is lost there is in the files.
        log_every_steps: of step records the loggers receive only every so many.
    """

    def __init__(self, run_dir: str | Path, loggers: Iterable[Any] = (), log_every_steps: int = 1):
        self._path = Path(run_dir) / "metrics.jsonl"
        self._loggers = list(loggers)
        self._log_every_steps = log_every_steps
        _drop_cut_line(self._path)
        with writing(self._path.parent):
            self._file = self._path.open("ab")

    def purge_after(self, step: int) -> None:
        """Tells TensorBoard that what it was given for later steps comes again."""
        for logger in self._loggers:
            experiment = getattr(logger, "experiment", None)
            if isinstance(experiment, SummaryWriter):
                # What SummaryWriter(purge_step=...) writes; Lightning makes the writer before the step is known.
                start = SessionLog(status=SessionLog.START)
                file: Any = experiment.file_writer
                file.add_event(Event(step=step + 1, file_version="brain.Event:2"))
                file.add_event(Event(step=step + 1, session_log=start))

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
        self._tell(lambda logger: logger.log_metrics(numbers, step))

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Gives the loggers records of samples.jsonl, which are of one kind, as a table with a row for each output."""
        rows = [
            [sample["id"], sample["prompt"], sample["reference"], output["text"], output["reward"], output["weight"]]
            for sample in samples
            for output in sample["outputs"]
        ]
        if rows:
            name = f"samples/{samples[0]['kind']}"
            self._tell(lambda logger: hasattr(logger, "log_table") and logger.log_table(name, COLUMNS, rows, step=step))

    def finish(self, state: str) -> None:
        """Tells the loggers that want to know how the training has ended: ``finished``, ``interrupted``, ``failed``."""
        self._tell(lambda logger: hasattr(logger, "finish") and logger.finish(state))

    def _tell(self, what: Callable[[Any], object]) -> None:
        for logger in list(self._loggers):
            try:
                what(logger)
            except Exception as error:  # of whatever it is built on
                self._loggers.remove(logger)
                problem = f"{type(error).__name__}: {error}"
                failed = f"{type(logger).__name__} fails, and gets nothing more of this run"
                warnings.warn(f"{failed}: {problem}", stacklevel=3)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; [] if there is no such file yet. A cut last line is left out.

    Raises:
        ValueError: with file and line, if any other line is not a JSON object.
    """
    return _read(Path(path))


def write_samples(
    run_dir: str | Path,
    iteration: int,
    groups: Sequence[Group],
    kind: str,
    alpha: Sequence[Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """Appends groups to ``run_dir``/samples.jsonl, and returns the records, a line each:
    ``{"iteration", "kind", "id", "prompt", "reference", "outputs": [{"text", "reward", "weight"}]}``.

    Args:
        kind: ``start`` (the start model on held-out prompts), ``train`` (a rollout), ``validation`` or ``final``.
        alpha: each output's self-normalised weight, [groups][outputs]: lists or a tensor; rows may be padded.
    """
    assert kind in SAMPLE_KINDS, kind
    path = Path(run_dir) / "samples.jsonl"
    _drop_cut_line(path)
    rewards_G = [getattr(group, "rewards", None) for group in groups]
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
                    "reward": None if rewards is None else _plain(rewards[i]),
                    "weight": None if alpha is None else _plain(alpha[g][i]),
                }
                for i, output in enumerate(group.outputs)
            ],
        }
        for g, (group, rewards) in enumerate(zip(groups, rewards_G, strict=True))
    ]
    with writing(path.parent), path.open("ab") as file:
        file.write(_lines(records))
    return records


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The groups of a samples.jsonl, in order; as tolerant as ``read_metrics``."""
    return _read(Path(path))


@dataclass(frozen=True)
class RunSummary:
    """A run in a few numbers: what the final summary and the head of the report show.

    ``start`` and ``last`` are eval records (None before the first); seconds are sums over iterations, but
    ``step_seconds`` over optimizer steps; ``train_tokens_per_second`` is the tokens of these over their seconds.
    """

    iterations: int
    steps: int
    start: dict[str, Any] | None
    last: dict[str, Any] | None
    sample_seconds: float
    score_seconds: float
    train_seconds: float
    step_seconds: float
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
        step_seconds=step_seconds,
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


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines' objects."""
    if not path.exists():
        return []
    # Lines end at b"\n" alone: str.splitlines would also cut at the separators that outputs may contain.
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
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
        records.append(record)
    return records
