"""What the tables share: fresh processes, interleaved timing, peak memory, and the facts that stand beside figures."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_M_MMAP_THRESHOLD = -3  # malloc.h
_PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "transformers")
_ON_CARDS = ("triton", "transformer_engine", "flash_attn", "liger_kernel", "vllm")


def fresh(function: Callable, *args, ranks: int = 1, precise_memory: bool = False, **kwargs):
    """Calls ``function`` in a fork of this process, so that memory peaks and process groups are its own.

    A fork has the imports done, which for NeMo take longer than most measurements. This process must not have started
    threads of torch.

    Args:
        ranks: how many forks, with RANK, WORLD_SIZE ... set as torchrun does.
        precise_memory: freed tensors go back to the system at once. Slower, so for processes that measure memory only.

    Returns:
        What the function returned on rank 0.

    Raises:
        RuntimeError: with the traceback of the rank that failed first.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, GROUP_RANK=0)
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="benchmarks")
        process = context.Process(
            target=_child, args=(theirs, environment, precise_memory, function, args, kwargs), daemon=False
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers: dict[int, object] = {}
    try:
        while len(answers) < ranks:
            waiting = [pipes[rank] for rank in range(ranks) if rank not in answers]
            for pipe in multiprocessing.connection.wait(waiting):
                rank = pipes.index(pipe)
                try:
                    answers[rank], error = pipe.recv()
                except EOFError:
                    error = "the process was killed"
                if error:
                    raise RuntimeError(f"{function.__qualname__}, rank {rank}: {error}")
    finally:
        for process in processes:
            if len(answers) < ranks:
                process.kill()
            process.join()
    return answers[0]


def _child(pipe, environment, precise_memory, function, args, kwargs) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    if precise_memory:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        pipe.send((function(*args, **kwargs), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # process groups and threads of a measurement are not worth an orderly end


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, seconds: float = float("inf"), warm_up: bool = True
) -> dict[str, list[float]]:
    """Wall seconds of each case, A B A B ...: what disturbs the machine disturbs all of them.

    Args:
        cases: what to time. A case that returns a float is its own clock: that many seconds.
        repeats: rounds, fewer (but at least one) where the next would end after ``seconds``.
        warm_up: every case runs once before the clock starts.
    """
    started = time.perf_counter()
    if warm_up:
        for case in cases.values():
            case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(repeats):
        spent = time.perf_counter() - started
        if done and spent + spent / (done + warm_up) > seconds:
            break
        for name, case in cases.items():
            synchronize()
            before = time.perf_counter()
            own = case()
            synchronize()
            times[name].append(own if isinstance(own, float) else time.perf_counter() - before)
    return times


def seconds_of(function: Callable[[], object]) -> float:
    synchronize()
    before = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - before


def synchronize() -> None:
    """Waits until a card has done what it was given; a call returns before that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, and how many there are."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high, "repeats": len(values)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The ratio of medians, with the quartiles of the rounds' own ratios."""
    rounds = spread([a / b for a, b in zip(numerator, denominator, strict=True)])
    return {**rounds, "median": statistics.median(numerator) / statistics.median(denominator)}


def peak_extra(function: Callable[[], object]) -> int:
    """The bytes that a call needs at its peak, beyond what the process holds before it: of resident memory, or of a
    card's where there is one, as torch's allocator counts them."""
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:  # the peak is then the whole process's: right in a fresh one
        before = _status("VmRSS")
        function()
        return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


class Meter:
    """Turns a call into a case of ``interleaved`` that also keeps its peak of extra memory: for calls too long to make
    once more for the memory alone."""

    def __init__(self, function: Callable[[], object]):
        self.function = function
        self.peak = 0

    def __call__(self) -> float:
        seconds = []
        self.peak = max(self.peak, peak_extra(lambda: seconds.append(seconds_of(self.function))))
        return seconds[0]


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Stopwatch:
    """Sums the seconds spent in functions that are replaced by timed ones for as long as it is entered."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._replaced: list[tuple[object, str, object]] = []

    def watch(self, owner: object, name: str, label: str) -> None:
        """Times ``owner.name`` under ``label``; of nested calls each keeps its own time, without the inner ones'."""
        original = getattr(owner, name)
        self._replaced.append((owner, name, original))
        self.seconds[label] = 0.0

        def timed(*args, **kwargs):
            with self.part(label):
                return original(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        outer, self._inner = getattr(self, "_inner", 0.0), 0.0
        before = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - before
            self.seconds[label] = self.seconds.get(label, 0.0) + spent - self._inner
            self._inner = outer + spent

    def __deepcopy__(self, memo) -> Stopwatch:
        return self  # NeMo copies a trainer's callbacks, to keep a record of their arguments

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_) -> None:
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)


def top_operations(function: Callable[[], object], count: int = 12) -> list[dict]:
    """torch.profiler's operations by self time: share of the whole, milliseconds, calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operation": event.key,
            "share": event.self_cpu_time_total / total,
            "milliseconds": event.self_cpu_time_total / 1e3,
            "calls": event.count,
        }
        for event in events[:count]
    ]


def facts() -> dict[str, object]:
    """Date, machine, versions: what a figure needs beside it. ``card``: None without CUDA."""
    cpu = next((line.split(":")[1] for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown")
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    if torch.cuda.is_available():
        installed = {distribution.name for distribution in importlib.metadata.distributions()}
        versions |= {name: importlib.metadata.version(name) for name in _ON_CARDS if name in installed}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} x {cpu.strip()}",
        "memory_gib": round(memory / 2**20, 1),
        "card": _card(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.strip() or None,
    }


def _card() -> str | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
