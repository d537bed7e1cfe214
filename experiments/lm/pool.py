"""Runs side by side, in processes of one thread each; every one is kept as soon as it is made."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Any

import torch

from experiments.results import Results


class Pool:
    """Processes that keep their models between runs. A context manager: leaving it by an error drops what waits."""

    def __init__(self, processes: int):
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def fill(self, results: Results, make: Callable[[dict], Any], runs: Iterable[dict[str, Any]]) -> None:
        """Makes the runs that are missing, in their order as far as processes are free."""
        missing: list[dict[str, Any]] = []
        for run in runs:
            if run not in results and run not in missing:
                missing.append(run)
        began, waiting = time.monotonic(), {self._pool.submit(make, run): run for run in missing}
        for count, done in enumerate(as_completed(waiting), 1):
            run = waiting[done]
            results.put(run, done.result())
            minutes = (time.monotonic() - began) / 60
            print(f"{count} of {len(missing)}, {minutes:.1f} min: {run}", flush=True)
