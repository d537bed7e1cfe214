"""Runs a function on several ranks, each a fresh interpreter: where CUDA is in use, a fork could not use it.

What ``ranks.py`` does faster where there is no card. The function must be importable: from a module of tests/ itself.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_spawned(
    function: Callable, world_size: int, *args, on_cpu: bool = False, hidden: Sequence[str] = (), **kwargs
) -> list | str:
    """Calls ``function(*args, **kwargs)`` on ``world_size`` ranks and returns what each returned, in order, with its
    tensors on the CPU; or ``killed``, if one was by SIGKILL.

    Args:
        on_cpu: the ranks see no card.
        hidden: packages that they do not find, though they are installed.

    Raises:
        AssertionError: with the end of what the first rank that failed has written.
    """
    from ranks import free_port

    with tempfile.TemporaryDirectory() as scratch:
        call = Path(scratch, "call")
        call.write_bytes(pickle.dumps((function, args, kwargs)))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "WORLD_SIZE": str(world_size)}
        environment |= dict(LOCAL_WORLD_SIZE=str(world_size), GROUP_RANK="0", TORCHELASTIC_RUN_ID="tests")
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        if on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        processes = []
        for rank in range(world_size):
            with Path(scratch, f"{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, scratch, *hidden],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        failed = _wait(processes)
        if failed is None:
            import torch

            return [torch.load(Path(scratch, f"{r}.result"), "cpu", weights_only=False) for r in range(world_size)]
        if processes[failed].returncode == -signal.SIGKILL:
            return "killed"
        raise AssertionError(f"rank {failed} failed:\n{Path(scratch, f'{failed}.log').read_text()[-6000:]}")


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """The rank that ended badly first, and has ended the others; None: all of them ended well."""
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed:
            for process in processes:
                process.kill()
                process.wait()
            return failed[0]
        time.sleep(0.05)
    return next((rank for rank, process in enumerate(processes) if process.returncode), None)


def _rank(scratch: Path, hidden: Sequence[str]) -> None:
    for package in hidden:
        sys.modules[package] = None  # type: ignore[assignment]  # who imports it, finds none
    import conftest  # noqa: F401 (as in the tests: Megatron's CPU meaning, where there is no card)
    import torch

    function, args, kwargs = pickle.loads((scratch / "call").read_bytes())
    torch.save(function(*args, **kwargs), scratch / f"{os.environ['RANK']}.result")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # process groups and threads of a test are not worth an orderly end


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2:])
