"""Penalties for outputs that are too long, or that repeat themselves; to be added to another reward."""

from __future__ import annotations

from collections.abc import Sized

from nemo_brain.rewards.verifiers.base import Verifier, check_number


class LengthPenalty(Verifier):
    """DAPO's soft overlong punishment (Yu et al. 2025, equation 13): 0 up to ``max_length - buffer``, then falling
    linearly to -1 at ``max_length``, and -1 beyond.

    Args:
        max_length: in ``unit``.
        buffer: how much below it the penalty begins; at most ``max_length``.
        unit: ``words`` (what white space parts) or ``characters``.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    def __init__(self, max_length: int, buffer: int, unit: str = "words"):
        check_number("max_length", max_length, whole=True, at_least=1)
        check_number("buffer", buffer, whole=True, at_least=1)
        if buffer > max_length:
            raise ValueError(f"reward.buffer ({buffer}) must be at most reward.max_length ({max_length})")
        if unit not in ("words", "characters"):
            raise ValueError(f"reward.unit must be words or characters, not {unit!r}")
        self._max_length, self._buffer, self._unit = max_length, buffer, unit

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        parts: list[Sized] = [output.split() if self._unit == "words" else output for output in outputs]
        over = [len(part) - (self._max_length - self._buffer) for part in parts]
        return [-min(1.0, max(0, length) / self._buffer) for length in over]


class RepetitionPenalty(Verifier):
    """Minus the share of an output's n-grams that repeat an earlier one (Yeo et al. 2025; open-r1's repetition
    penalty): 0 where all are distinct, towards -1 the more it repeats.

    Args:
        ngram: words of an n-gram; case does not count. An output with fewer words has no n-gram, and no penalty.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    def __init__(self, ngram: int = 4):
        check_number("ngram", ngram, whole=True, at_least=1)
        self._ngram = ngram

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        return [self._penalty(output.lower().split()) for output in outputs]

    def _penalty(self, words: list[str]) -> float:
        grams = list(zip(*(words[start:] for start in range(self._ngram)), strict=False))
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
