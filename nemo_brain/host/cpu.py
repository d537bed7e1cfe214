"""What Megatron and NeMo need on a machine without CUDA. With CUDA nothing here does anything.

Megatron-core calls ``torch.cuda`` functions and names the device "cuda" unconditionally. ``enable`` gives both their
CPU meaning; no line of Megatron or NeMo is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


def _names_cuda(device: object) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


class _CudaMeansCpu(TorchFunctionMode):
    """``device="cuda"``, ``.cuda()``, ``.to("cuda")`` and ``pin_memory=True`` mean ordinary host memory."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer and gradient clipping sort parameters by comparing this string.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Generators:
    """Stands for ``torch.cuda.default_generators``: the one CPU generator, whatever the index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def enable() -> bool:
    """Makes Megatron and NeMo run on the CPU. Call it before importing them; a second call changes nothing.

    Returns:
        Whether the CPU meaning is in force, that is, whether CUDA is absent.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is not None:
        return True
    if "OMP_NUM_THREADS" not in os.environ:
        # Threads of one process wait for each other on small matrices; data-parallel ranks use the cores better.
        torch.set_num_threads(1)
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = lambda *args, **kwargs: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda._lazy_init = lambda: None
    _mode = _CudaMeansCpu()
    _mode.__enter__()
    return True


def seed_tracker(seed: int) -> None:
    """Seeds Megatron's tracker of random numbers, once its groups are made: NeMo does so only where it counts a GPU.

    As NeMo's, the seed differs between pipeline stages; Megatron makes it differ between tensor-parallel ranks.
    """
    if torch.cuda.is_available():
        return
    from megatron.core import parallel_state, tensor_parallel  # not before ``enable``

    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
