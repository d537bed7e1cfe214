"""A figure's result file: every run with its settings and what came out, one run a line, written after each run."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DIGITS = 6  # significant, of numbers in a result file


class Results:
    """The runs of one figure. Runs of other settings than today's stay in the file.

    Args:
        path: a JSON file of a list of {"settings", "result", "made"}; made at the first run.
    """

    def __init__(self, path: Path):
        self._path = path
        runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self._runs = {_key(run["settings"]): run for run in runs}

    def get(self, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The result of a run: the one in the file, or made now and kept before this returns."""
        if settings not in self:
            self.put(settings, make())
        return self[settings]

    def __getitem__(self, settings: dict[str, Any]) -> Any:
        """The result of a run that is in the file."""
        return self._runs[_key(settings)]["result"]

    def put(self, settings: dict[str, Any], result: Any) -> None:
        """Keeps a run, before this returns."""
        self._runs[_key(settings)] = {"settings": settings, "result": _rounded(result), "made": provenance()}
        self._write()

    def __contains__(self, settings: dict[str, Any]) -> bool:
        return _key(settings) in self._runs

    def made(self) -> str:
        """When and where, of the latest run."""
        if not self._runs:
            return "not made yet"
        return max(run["made"] for run in self._runs.values())

    def all(self) -> list[Any]:
        """Every run's result."""
        return [run["result"] for run in self._runs.values()]

    def __len__(self) -> int:
        return len(self._runs)

    def _write(self) -> None:
        lines = ",\n".join(json.dumps(run) for run in self._runs.values())
        scratch = self._path.with_suffix(".part")
        scratch.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(scratch, self._path)


def provenance() -> str:
    """The day, the machine and the versions that stand beside a figure."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{datetime.date.today().isoformat()}, one core of {os.cpu_count()} ({cpu}); {versions}"


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
