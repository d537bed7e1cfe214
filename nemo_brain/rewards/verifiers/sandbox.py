"""Runs Python programs that nobody has read, in processes with limits: ``sandbox_start.py`` says what holds there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START = Path(__file__).with_name("sandbox_start.py")
_HARNESS = Path(__file__).with_name("sandbox_harness.py")
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",  # the order of sets: a program's result is to be the same each time
}


class SandboxError(Exception):
    """The sandbox cannot be made here."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. CPU seconds, memory and file size are of each of its processes, ``processes`` counts
    threads, ``output_bytes`` is what it may write to standard output; ``isolated``: without network and files."""

    wall_seconds: float
    cpu_seconds: int
    memory_bytes: int
    processes: int
    file_bytes: int
    output_bytes: int
    isolated: bool


@dataclass(frozen=True)
class Finished:
    """What a program left: its exit status (None: it ran into a limit and was killed), standard output, and what the
    harness reported."""

    status: int | None
    output: bytes
    report: bytes


def run(job: dict[str, Any], stdin: str, limits: Limits) -> Finished:
    """Runs a job of the harness, see there.

    Raises:
        SandboxError: the sandbox could not be made.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox_"))
        job_file, input_file = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        for file, text in ((job_file, json.dumps(job)), (input_file, stdin)):
            file.write(text.encode("utf-8", errors="replace"))
            file.seek(0)
        reading, writing = os.pipe()
        report = stack.enter_context(open(reading, "rb", buffering=0))
        harness = _HARNESS.read_text(encoding="utf-8")
        python = [sys.executable, "-s", "-P", "-B"]
        rules = {**dataclasses.asdict(limits), "prefixes": [sys.base_prefix, sys.prefix]}
        command = [*python, "-c", harness, str(job_file.fileno()), str(writing)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_START), json.dumps(rules), *command],
                stdin=input_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_ENVIRONMENT,
                pass_fds=(job_file.fileno(), writing),
                start_new_session=True,
                bufsize=0,
            )
        finally:
            os.close(writing)
        with process:
            streams = [process.stdout, report, process.stderr]
            output, said, failure = (bytearray() for _ in streams)
            within = _read(dict(zip(streams, (output, said, failure), strict=True)), limits)
            if not within:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        if not limits.isolated:  # there is no init that does it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if failure:
            raise SandboxError(failure.decode(errors="replace").strip())
        return Finished(status if within else None, bytes(output), bytes(said))


def _read(streams: dict[Any, bytearray], limits: Limits) -> bool:
    """Reads until all streams have ended. Returns whether they did so within the limits."""
    deadline = time.monotonic() + limits.wall_seconds
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                part = os.read(key.fd, 65536)
                if not part:
                    selector.unregister(key.fileobj)
                streams[key.fileobj] += part
            if not ready or any(len(read) > limits.output_bytes for read in streams.values()):
                return False
    return True
