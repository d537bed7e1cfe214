"""A reward for outputs with a Python program that passes its prompt's tests."""

from __future__ import annotations

import ast
import json
import os
import secrets
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.rewards.verifiers.base import Verifier, check_number
from nemo_brain.rewards.verifiers.extract import last_block
from nemo_brain.rewards.verifiers.sandbox import Limits, SandboxError, run

_FORMS = (
    "a list of Python assertions, or of {input: standard input, output: what is to be printed}; or text: such a list "
    "as JSON, or assertions, one a line"
)


@dataclass(frozen=True)
class _Assertion:
    """Python source that is evaluated after the program. ``expected``: a literal that its value is compared with, here
    and not where the program could see or forge it; without one it is only not to fail."""

    source: str
    compared: bool
    expected: Any = None


@dataclass(frozen=True)
class _Printed:
    """What the program prints for an input."""

    input: str
    output: str


class CodeReward(Verifier):
    """The share of its prompt's tests that an output's program passes, in [0, 1]; 0 for an output without a program.

    Each program runs in a sandbox (``sandbox_start.py``): no network, no files but the interpreter's, limits. It needs
    Linux 5.12 or newer, and root with CAP_SYS_ADMIN or the right to make user namespaces, which a container may take
    away.

    Args:
        field: where in a prompt's record its tests stand; those of a record without it are its reference.
        fenced: the program is the output's last Markdown fence (```python, ```py, or without a label); false: all of
            the output.
        score: ``share``; ``all``, 1 for a program that passes all tests and 0 for another.
        isolation: ``namespaces``; ``none``, where they cannot be made: programs then reach network, files and
            processes as this one does, and what they leave running is not ended. For programs that you would run
            yourself.
        workers: programs side by side; null: as many as this process has cores.
        wall_seconds, cpu_seconds, memory_mb, processes (and threads), file_mb, output_kb: of one run of a program.
            Assertions share a run; each input has its own. CPU time and memory are of each process.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    def __init__(
        self,
        field: str = "tests",
        fenced: bool = True,
        score: str = "share",
        isolation: str = "namespaces",
        workers: int | None = None,
        wall_seconds: float = 10.0,
        cpu_seconds: int = 5,
        memory_mb: int = 512,
        processes: int = 8,
        file_mb: int = 16,
        output_kb: int = 256,
    ):
        if type(fenced) is not bool:
            raise ValueError(f"reward.fenced must be true or false, not {fenced!r}")
        if score not in ("share", "all"):
            raise ValueError(f"reward.score must be share or all, not {score!r}")
        if isolation not in ("namespaces", "none"):
            raise ValueError(f"reward.isolation must be namespaces or none, not {isolation!r}")
        workers = len(os.sched_getaffinity(0)) if workers is None else workers
        check_number("wall_seconds", wall_seconds)
        counts = {"cpu_seconds": cpu_seconds, "memory_mb": memory_mb, "processes": processes, "file_mb": file_mb}
        for name, value in {**counts, "output_kb": output_kb, "workers": workers}.items():
            check_number(name, value, whole=True, at_least=1)
        self._field = field
        self._fenced = fenced
        self._all = score == "all"
        self._limits = Limits(
            wall_seconds=wall_seconds,
            cpu_seconds=cpu_seconds,
            memory_bytes=memory_mb * 2**20,
            processes=processes,
            file_bytes=file_mb * 2**20,
            output_bytes=output_kb * 2**10,
            isolated=isolation == "namespaces",
        )
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="code")

    def load(self) -> None:
        """Tries the sandbox. ValueError: it cannot be made here."""
        try:
            done = run({"program": "print(6 * 7)"}, "", self._limits)
        except SandboxError as error:
            raise ValueError(
                f"no sandbox can be made on this machine ({error}): allow this process user namespaces or "
                "CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN, or a seccomp profile with unshare, mount, pivot_root), "
                "serve the reward from a machine that has them (nemo-brain serve-reward), or give up the isolation "
                "from network and files with reward.isolation=none"
            ) from error
        if done.output != b"42\n":
            raise ValueError(
                f"a program that prints a number ends with status {done.status} in the sandbox: raise its limits "
                "(reward.memory_mb, reward.wall_seconds, reward.processes), or move Python's environment out of /tmp, "
                f"which the sandbox has for itself ({sys.prefix})"
            )

    def check(self, reference: str | None, metadata: dict) -> None:
        self._tests(reference, metadata)

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        tests = [self._tests(reference, record) for reference, record in zip(references, metadata, strict=True)]
        return list(self._threads.map(self._score, outputs, tests))

    def _score(self, output: str, tests: Sequence[_Assertion | _Printed]) -> float:
        program = last_block(output, ("python", "py", "python3")) if self._fenced else output
        if program is None:
            return 0.0
        asserted = [test for test in tests if isinstance(test, _Assertion)]
        passed = self._assertions(program, asserted) if asserted else 0
        for test in tests:
            if isinstance(test, _Printed):
                done = run({"program": program}, test.input, self._limits)
                passed += done.status == 0 and _lines(done.output.decode(errors="replace")) == _lines(test.output)
        heartbeat()
        return float(passed == len(tests)) if self._all else passed / len(tests)

    def _assertions(self, program: str, tests: Sequence[_Assertion]) -> int:
        """How many of them hold."""
        token = secrets.token_hex(16)
        job = {"program": program, "token": token, "tests": [[test.source, test.compared] for test in tests]}
        passed = set()
        for line in run(job, "", self._limits).report.splitlines():
            try:
                said, index, value = json.loads(line)
                if said != token:
                    return 0  # somebody else has written it
                if not tests[index].compared or ast.literal_eval(value) == tests[index].expected:
                    passed.add(index)
            except (ValueError, TypeError, IndexError, SyntaxError, MemoryError, RecursionError):
                continue
        return len(passed)

    def _tests(self, reference: str | None, metadata: dict) -> list[_Assertion | _Printed]:
        where = self._field if self._field in metadata else "reference"
        given = metadata.get(self._field, reference)
        if not given:
            raise ValueError(f"no tests (write them into the record's {self._field!r} or 'reference': {_FORMS})")
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                given = [line for line in given.splitlines() if line.strip()]
        try:
            return [_test(item) for item in given]  # of what is no list, a number for example: TypeError
        except (TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{where!r} holds no tests: {error} (write {_FORMS})") from error


def _test(item: Any) -> _Assertion | _Printed:
    if isinstance(item, dict) and item.keys() == {"input", "output"} and all(isinstance(v, str) for v in item.values()):
        return _Printed(**item)
    if not isinstance(item, str):
        raise ValueError(f"{item!r}")
    statements = ast.parse(item).body
    if len(statements) == 1 and isinstance(statements[0], ast.Assert):
        test = statements[0].test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            sides = [test.left, test.comparators[0]]
            for value, literal in (sides, sides[::-1]):
                try:
                    return _Assertion(ast.unparse(value), True, ast.literal_eval(literal))
                except ValueError:
                    continue
    return _Assertion(item, False)


def _lines(text: str) -> list[str]:
    """Without white space at the ends of lines and of the text."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
