"""A reward for outputs that a regular expression matches."""

from __future__ import annotations

import warnings

import regex

from nemo_brain.rewards.verifiers.base import Verifier, check_number


class RegexReward(Verifier):
    """1 for an output that matches, 0 for another.

    Args:
        pattern: in the syntax of the ``regex`` package, which is that of ``re`` and more; ``(?i)`` and the like stand
            in it.
        match: ``fullmatch``, the whole output; ``search``, any part of it.
        timeout_seconds: for one output, which then counts as not matching, with a warning.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    def __init__(self, pattern: str, match: str = "fullmatch", timeout_seconds: float = 1.0):
        if match not in ("fullmatch", "search"):
            raise ValueError(f"reward.match must be fullmatch or search, not {match!r}")
        check_number("timeout_seconds", timeout_seconds)
        try:
            compiled = regex.compile(pattern)
        except (regex.error, TypeError) as error:
            raise ValueError(f"reward.pattern={pattern!r} is no regular expression: {error} (correct it)") from error
        self.name = f"RegexReward of {pattern!r}"
        self._match = getattr(compiled, match)
        self._timeout_seconds = timeout_seconds

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        return [float(self._matches(output)) for output in outputs]

    def _matches(self, output: str) -> bool:
        try:
            # concurrent: other threads run meanwhile, which sample.
            return self._match(output, timeout=self._timeout_seconds, concurrent=True) is not None
        except TimeoutError:
            warnings.warn(
                f"{self.name}: an output of {len(output)} characters took longer than reward.timeout_seconds="
                f"{self._timeout_seconds:g} and counts as not matching; the pattern backtracks: make it simpler",
                stacklevel=2,
            )
            return False
