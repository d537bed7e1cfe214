"""Runs a function on several ranks: forks of the test process, so that NeMo is imported once for all of them."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable, world_size: int, *args, **kwargs) -> list:
    """Calls ``function(*args, **kwargs)`` on ``world_size`` ranks (RANK, WORLD_SIZE ... are set as torchrun does).

    Returns what each rank returned, in order. The first rank that raised fails the test with its traceback; the others
    are killed then, as torchrun would.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        pids = {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(function, rank, world_size, port, Path(scratch), args, kwargs)
            pids[pid] = rank
        failed = None
        while pids:
            pid, status = os.wait()
            rank = pids.pop(pid, None)
            if rank is not None and status != 0 and failed is None:
                failed = rank
                for other in pids:
                    os.kill(other, 9)
        if failed is not None:
            error = Path(scratch, f"{failed}.error")
            raise AssertionError(f"rank {failed} failed:\n{error.read_text() if error.exists() else 'killed'}")
        return [pickle.loads(Path(scratch, f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _child(function, rank, world_size, port, scratch, args, kwargs) -> None:
    status = 1
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
