"""What Megatron and NeMo need on a machine without CUDA. With CUDA nothing here does anything.

Megatron-core calls ``torch.cuda`` functions and names the device "cuda" unconditionally. ``enable`` gives both their
CPU meaning; no line of Megatron or NeMo is replaced.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device as torch_device
from torch.utils import cpp_extension

_CPU = torch.device("cpu")
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_enabled = False


def _names_cuda(device: object) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _on_host(function: Callable) -> Callable:
    """A function that makes a tensor: ``device="cuda"`` and ``pin_memory=True`` mean ordinary host memory."""

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return made


def _replace_tensor_functions() -> None:
    """Each by itself: a TorchFunctionMode would cost every call of torch's, and knows only its own thread."""
    constructors = torch_device._device_constructors()  # kept by torch for its own contexts, as they are now
    for name, function in vars(torch).copy().items():
        if name in _LIKE or (callable(function) and function in constructors):
            setattr(torch, name, _on_host(function))
    tensor: Any = torch.Tensor
    for name in _NEW:
        setattr(tensor, name, _on_host(getattr(tensor, name)))
    to, kind = _on_host(tensor.to), tensor.type

    @functools.wraps(to)
    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *(_CPU if _names_cuda(value) else value for value in args), **kwargs)

    @functools.wraps(kind)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return kind(self, *args, **kwargs)
        # Megatron's optimizer and gradient clipping sort parameters by comparing this string.
        return kind(self).replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = moved, named
    tensor.cuda = lambda self, *args, **kwargs: self


class _Generators:
    """Stands for ``torch.cuda.default_generators``: the one CPU generator, whatever the index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


class _NoStream:
    """Stands for ``torch.cuda.Stream``, which is named in annotations too."""

    def __new__(cls, *args: Any, **kwargs: Any) -> None:
        return None


def enable() -> bool:
    """Makes Megatron and NeMo run on the CPU. Call it before importing them; a second call changes nothing.

    Returns:
        Whether the CPU meaning is in force, that is, whether CUDA is absent.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    # With a CUDA build of torch and a compiler Megatron's import would compile an allocator, and fail without a device.
    cpp_extension.CUDA_HOME = None
    if "OMP_NUM_THREADS" not in os.environ:
        # Threads of one process wait for each other on small matrices; data-parallel ranks use the cores better.
        torch.set_num_threads(1)
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = _NoStream
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda._lazy_init = lambda: None
    _replace_tensor_functions()
    _enabled = True
    return True


def seed_tracker(seed: int) -> None:
    """Seeds Megatron's tracker of random numbers, once its groups are made: NeMo does so only where it counts a GPU.

    As NeMo's, the seed differs between pipeline stages; Megatron makes it differ between tensor-parallel ranks.
    """
    if torch.cuda.is_available():
        return
    from megatron.core import parallel_state, tensor_parallel  # not before ``enable``

    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
