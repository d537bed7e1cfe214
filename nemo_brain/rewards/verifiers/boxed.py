r"""A reward for outputs whose ``\boxed{...}`` is mathematically the reference: MATH's and the like."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.rewards.verifiers.base import Verifier, check_number
from nemo_brain.rewards.verifiers.extract import last_boxed

_WORKER = Path(__file__).with_name("math_worker.py")


class BoxedAnswerReward(Verifier):
    r"""1 for an output whose last ``\boxed{...}`` equals the reference as mathematics, 0 for another.

    The reference is an expression in LaTeX or plain text, or a solution with a ``\boxed{...}`` of its own. Answers that
    are the same text are equal; others are compared by the Math-Verify library, in processes of its own: an expression
    like ``10^{10^{10}}`` would keep this one busy for ever, and its own time limits need the main thread.

    Args:
        timeout_seconds: for one comparison, which then counts as unequal.
        workers: comparisons side by side.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy; Math-Verify is not installed.
    """

    def __init__(self, timeout_seconds: float = 5.0, workers: int = 2):
        check_number("timeout_seconds", timeout_seconds)
        check_number("workers", workers, whole=True, at_least=1)
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("BoxedAnswerReward needs Math-Verify: pip install 'nemo_brain[verifiers]'")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker(timeout_seconds))
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="math")

    def check(self, reference: str | None, metadata: dict) -> None:
        if not _expected(reference):
            raise ValueError("no reference (write the answer to be found into the record's 'reference')")

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        answers = [last_boxed(output) for output in outputs]
        pairs = [(_expected(reference), answer) for reference, answer in zip(references, answers, strict=True)]
        # The outputs of a prompt often give the same answer.
        asked = [(gold, answer) for gold, answer in dict.fromkeys(pairs) if answer and gold != answer]
        equal: dict[tuple[str, str | None], bool] = dict(zip(asked, self._threads.map(self._equal, asked), strict=True))
        equal |= {(gold, answer): True for gold, answer in pairs if gold == answer}
        return [float(equal.get(pair, False)) for pair in pairs]

    def _equal(self, pair: tuple[str, str]) -> bool:
        worker = self._idle.get()
        try:
            return worker.equal(*pair)
        finally:
            self._idle.put(worker)
            heartbeat()


def _expected(reference: str | None) -> str:
    return (last_boxed(reference or "") or reference or "").strip()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # it was asked for
    return stream


class _Worker:
    """A process that compares; started when it is needed, and anew after it took too long."""

    def __init__(self, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[str] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if not _pipe(self._process.stdout).readline():  # what it says once it has imported the library
                raise RuntimeError("Math-Verify cannot be imported in a process of its own")
        process = self._process
        questions, answers = _pipe(process.stdin), _pipe(process.stdout)
        limit = threading.Timer(self._timeout_seconds, process.kill)
        limit.start()
        found = ""
        with contextlib.suppress(BrokenPipeError):
            questions.write(json.dumps([gold, answer]) + "\n")
            questions.flush()
            found = answers.readline()
        limit.cancel()
        if not found:
            process.wait()  # it is ending, and no other question is to go there
        return found == "equal\n"
