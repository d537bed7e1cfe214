"""Kernels that are tried before they are used: a card or a version of theirs may be one that nobody has seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def works_here(problem: Callable[[], str | None], otherwise: str) -> bool:
    """Whether a kernel runs and computes what it should.

    Args:
        problem: tries it; what is wrong with what it has computed, None: nothing.
        otherwise: what is done without it, for the warning.
    """
    try:
        found = problem()
    except Exception as error:  # whatever a compiler comes upon
        found = f"it does not run here: {error!r}"
    if found is not None:
        warnings.warn(f"{otherwise}: {found}", stacklevel=3)
    return found is None
