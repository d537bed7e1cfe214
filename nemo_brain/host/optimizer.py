"""Megatron's optimizer: made with each of its versions, leaves out steps whose gradient is not finite, and goes on with
the configuration's settings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import MegatronOptimizer
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from torch.optim import Optimizer


class OptimizerModule(MegatronOptimizerModule):
    """NeMo's, for every version of Megatron-core: weights decay, but not biases and other vectors.

    NeMo gives Megatron's function the defaults of arguments (``no_weight_decay_cond`` and two more) that it has dropped
    in 0.16. While NeMo calls it, a function stands in its place that leaves them out.
    """

    def optimizers(self, model: MegatronParallel) -> list[Optimizer]:
        make = megatron_optimizer.get_megatron_optimizer

        def without_defaults(config: Any, chunks: Any, *, use_gloo_process_groups: bool, **_: Any) -> MegatronOptimizer:
            return make(config, chunks, use_gloo_process_groups=use_gloo_process_groups)

        megatron_optimizer.get_megatron_optimizer = without_defaults
        try:
            return super().optimizers(model)
        finally:
            megatron_optimizer.get_megatron_optimizer = make


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


@contextlib.contextmanager
def keeping_settings(optimizers: Sequence[Any]) -> Iterator[None]:
    """Around the loading of optimizer states: learning rate, weight decay, betas and the like stay what they are.

    torch and Megatron take them from the checkpoint, and a configuration that says otherwise is silently not followed.

    Args:
        optimizers: NeMo's ``McoreDistributedOptimizer``s.
    """
    before = [
        {name: value for name, value in group.items() if name not in ("params", "step")}  # Apex counts steps there
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    yield
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, settings in zip(groups, before, strict=True):
        group.update(settings)


def move_schedules(configs: Sequence[Any], steps: int) -> list[dict[str, int]]:
    """Puts schedulers of the learning rate, and their optimizers, where they are after so many steps.

    A checkpoint has the schedule of the configuration that it was written with. NeMo's schedulers compute each rate
    from the number of steps and what they were made with, so these are an uninterrupted run's to the last bit.

    Args:
        configs: Lightning's ``LRSchedulerConfig``s.

    Returns:
        What is to be restored of each after this: nothing else.
    """
    for config in configs:
        # The count is for a warning: of a schedule that moves before its optimizer.
        config.scheduler.load_state_dict({"last_epoch": steps - 1, "_step_count": steps + 1})
        config.scheduler.step()
    return [{"last_epoch": config.scheduler.last_epoch} for config in configs]
