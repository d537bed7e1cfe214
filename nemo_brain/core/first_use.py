"""Kernels that are tried before they are used: a card or a version of theirs may be one that nobody has seen."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch


def works_here(problem: Callable[[], str | None], otherwise: str) -> bool:
    """Whether a kernel runs and computes what it should; a warning where it does not.

    Args:
        problem: tries it; what is wrong with what it has computed, None: nothing. It may use gradients, whatever the
            first use does.
        otherwise: what is done without it, for the warning.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            found = problem()
    except Exception as error:  # whatever a compiler comes upon
        found = f"it does not run here: {error!r}"
    if found is not None:
        warnings.warn(f"{otherwise}: {found}", stacklevel=3)
    return found is None


def working(module: str, problem: Callable[[Any], str | None], otherwise: str) -> Any:
    """The module of kernels that has this name, if it can be imported and works; otherwise None, and a warning.

    Args:
        problem: as of ``works_here``; is given the module.
    """
    found: Any = None

    def of_module() -> str | None:
        nonlocal found
        found = importlib.import_module(module)  # ImportError without Triton
        return problem(found)

    return found if works_here(of_module, otherwise) else None


def largest_gap(pairs: Iterable[tuple[Any, Any]]) -> float:
    """The largest difference between tensors of a kernel and those that it should have computed; NaN if one is NaN."""
    gaps = [(ours.detach().double().cpu() - exact.detach().double().cpu()).abs().max() for ours, exact in pairs]
    return torch.stack(gaps).max().item()
