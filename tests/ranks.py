"""Runs a function on several ranks: forks of the test process, so that NeMo is imported once for all of them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Below those that the kernel lends to connections, and apart for test processes side by side: what is free stays free.
_PORTS = (10_000 + (997 * os.getpid() + number) % 20_000 for number in itertools.count())


def free_port() -> int:
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is always a next one")


class Ranks:
    """``function(*args, **kwargs)`` on ``world_size`` ranks that have been started (RANK ... are set as torchrun does).

    The first rank that ends badly ends the others too, as torchrun would.
    """

    def __init__(self, function: Callable, world_size: int, *args, **kwargs):
        self._scratch = tempfile.TemporaryDirectory()
        self._world_size = world_size
        self._killer: threading.Timer | None = None
        self._killed = False
        self._lock = threading.Lock()
        port = free_port()
        self._pids = {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(function, rank, world_size, port, Path(self._scratch.name), args, kwargs)
            self._pids[pid] = rank

    def kill_after(self, seconds: float, ranks: list[int]) -> None:
        """SIGKILL for these ranks after a while, if they still run."""

        def kill() -> None:
            with self._lock:
                for pid, rank in self._pids.items():
                    if rank in ranks:
                        self._killed = True
                        os.kill(pid, signal.SIGKILL)

        self._killer = threading.Timer(seconds, kill)
        self._killer.start()

    def wait(self) -> list | str:
        """What each rank returned, in order, or ``killed``; AssertionError with the first traceback."""
        failed = None
        while self._pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.01)
                continue
            with self._lock:
                rank = self._pids.pop(pid, None)
                if rank is not None and status != 0 and failed is None:
                    failed = rank
                    for other in self._pids:
                        os.kill(other, signal.SIGKILL)
        if self._killer is not None:
            self._killer.cancel()
        with self._scratch as scratch:
            if failed is None:
                return [pickle.loads(Path(scratch, f"{rank}.result").read_bytes()) for rank in range(self._world_size)]
            error = Path(scratch, f"{failed}.error")
            if self._killed:
                return "killed"
            raise AssertionError(f"rank {failed} failed:\n{error.read_text() if error.exists() else 'killed'}")


def run_ranks(function: Callable, world_size: int, *args, **kwargs) -> list:
    """Calls ``function(*args, **kwargs)`` on ``world_size`` ranks and returns what each returned, in order.

    The first rank that raised fails the test with its traceback; the others are killed then.
    """
    return Ranks(function, world_size, *args, **kwargs).wait()


def _child(function, rank, world_size, port, scratch, args, kwargs) -> None:
    status = 1
    # What is garbage by now is the parent's to collect: here its threads, which are not, would be waited for.
    gc.freeze()
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="tests",
        )
        result = function(*args, **kwargs)
        (scratch / f"{rank}.result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:  # the parent reports whatever ended the rank
        (scratch / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
