"""The reward of the toy configuration: simple enough for a byte model from scratch to learn within seconds."""

from __future__ import annotations


def letter_fraction(
    prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
) -> list[float]:
    """The fraction of each output's characters that are ASCII letters, in [0, 1]; 0 for an empty output."""
    return [sum(c.isascii() and c.isalpha() for c in output) / max(1, len(output)) for output in outputs]
