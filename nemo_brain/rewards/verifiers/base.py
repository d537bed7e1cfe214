"""What verifiers have in common: they look at what a prompt must hold, before a run begins and when they score."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from nemo_brain.rewards.protocol import OutputError


class Verifier(ABC):
    """A reward whose every output is scored by itself."""

    rescorable = True

    def check(self, reference: str | None, metadata: dict) -> None:
        """ValueError: a prompt with these cannot be verified; says what it lacks and the remedy."""
        return

    @abstractmethod
    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> Sequence[float]:
        """One finite number per output, of prompts that have been checked."""

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> Sequence[float]:
        """Raises OutputError for the first output whose prompt cannot be verified."""
        for index, (reference, record) in enumerate(zip(references, metadata, strict=True)):
            try:
                self.check(reference, record)
            except ValueError as error:
                raise OutputError(str(error), index) from error
        return self.score(outputs, references, metadata)


def check_number(name: str, value: object, *, at_least: float | None = None, whole: bool = False) -> None:
    """ValueError, naming the argument, unless ``value`` is a finite number above 0, or ``at_least`` so much."""
    kinds = (int,) if whole else (int, float)
    enough = type(value) in kinds and (value > 0 if at_least is None else value >= at_least)  # type: ignore[operator]
    if not enough or not math.isfinite(value):  # type: ignore[arg-type]
        bound = "above 0" if at_least is None else f"of at least {at_least:g}"
        raise ValueError(f"reward.{name} must be {'an integer' if whole else 'a number'} {bound}, not {value!r}")
