"""What a run shows while it works: a progress bar, or log lines without a terminal."""

from __future__ import annotations

import os
import sys
import time

import torch
from tqdm import tqdm

from nemo_brain.report.text import duration

LOG_SECONDS = 10.0


def progress(total: int | None, description: str, unit: str) -> tqdm | LogProgress:
    """A context manager whose ``update(n)`` reports n more of ``total`` units, with rate and time left.

    On rank 0 a bar on a terminal, or else at most a line every 10 seconds (work that is shorter stays silent); other
    ranks show nothing. Output goes to stderr.
    """
    if _rank() == 0 and not sys.stderr.isatty():
        return LogProgress(total, description, unit)
    return tqdm(total=total, desc=description, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=_rank() != 0)


class LogProgress:
    """Progress as plain lines, for logs: no carriage returns, no control characters."""

    def __init__(self, total: int | None, description: str, unit: str):
        self._total, self._description, self._unit = total, description, unit
        self._done = 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if time.monotonic() - self._started >= LOG_SECONDS:
            self._print()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._printed >= LOG_SECONDS and self._done != self._total:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        rate = self._done / max(elapsed, 1e-9)
        line = f"{self._description}: {self._done}"
        if self._total:
            line += f"/{self._total} ({self._done / self._total:.0%})"
        line += f" {self._unit}, {rate:.3g} {self._unit}/s, {duration(elapsed)} so far"
        if self._total and 0 < self._done < self._total:
            line += f", {duration((self._total - self._done) / rate)} left"
        print(line, file=sys.stderr, flush=True)


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))
