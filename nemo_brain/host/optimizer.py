"""Megatron's optimizer leaves out steps whose gradient is not finite."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

from megatron.core.optimizer import MegatronOptimizer


class OptimizerGuard:
    """Keeps an optimizer from stepping where the gradient's norm is not finite: weights and states stay as they were.

    Megatron itself looks for such gradients in fp16 only; its check for NaN (``check_for_nan_in_grad``) reads all of
    them once more, and ends the process. The guard takes the norm that ``ChainedOptimizer.step`` computes for clipping,
    the same on every rank, and costs a comparison: ``get_grad_norm`` and ``step_with_ready_grads``, which ``step``
    calls one after the other, are replaced on this one optimizer.

    ``skipped`` is the number of steps so far that were left out.

    Args:
        optimizer: a ``megatron.core.optimizer.ChainedOptimizer``.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self.skipped = 0
        self._finite = True
        norm, step = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm(_: Any) -> float:
            value = norm()
            self._finite = math.isfinite(float(value))
            return value

        def step_with_ready_grads(_: Any) -> bool:
            if self._finite:
                return step()
            self.skipped += 1
            return True

        optimizer.get_grad_norm = MethodType(get_grad_norm, optimizer)
        optimizer.step_with_ready_grads = MethodType(step_with_ready_grads, optimizer)
