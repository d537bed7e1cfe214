"""Megatron's optimizer: made with each of its versions, fused without further packages, leaves out steps whose gradient
is not finite, and goes on with the configuration's settings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
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
            made = super().optimizers(model)
        finally:
            megatron_optimizer.get_megatron_optimizer = make
        clip_in_few_calls()
        if torch.cuda.is_available():
            fuse(made)
        return made


def fuse(optimizers: Sequence[Any]) -> None:
    """Steps by torch's fused kernel where torch's Adam is what Megatron has: without Transformer Engine and Apex.

    Args:
        optimizers: NeMo's ``McoreDistributedOptimizer``s.
    """
    for adam in _torch_adams(optimizers):
        for group in adam.param_groups:
            group["fused"] = True


def _torch_adams(optimizers: Sequence[Any]) -> list[Any]:
    inner = [chained.optimizer for optimizer in optimizers for chained in optimizer.mcore_optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))]


def clip_in_few_calls() -> None:
    """The gradients' norm and their scaling, without Transformer Engine and Apex, for all tensors at once.

    Megatron's substitutes read one number from the device per tensor, and scale tensor by tensor. The same numbers.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _l2_norm(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list, per_tensor: bool) -> tuple:
    norms = torch.stack(torch._foreach_norm(tensor_lists[0], 2, torch.float32))
    return torch.linalg.vector_norm(norms).view(1), None


def _scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list, scale: float) -> None:
    sources, targets = tensor_lists
    assert sources is targets  # a gradient is clipped where it is
    torch._foreach_mul_(targets, scale)


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
    for adam in _torch_adams(optimizers):
        for group in adam.param_groups:
            for parameter in group["params"] if group["fused"] else ():
                # The fused kernel counts steps on the device, another one on the host: the checkpoint's may be either.
                if "step" in (state := adam.state[parameter]):
                    state["step"] = state["step"].to(parameter.device, torch.float32)


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
