"""The process group of a run, made before NeMo would make it, and Megatron's groups then."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.lightning import MegatronStrategy
from nemo.lightning._strategy_lib import init_model_parallel


def connect(timeout_minutes: float) -> None:
    """Joins the ranks that a launcher has started (torchrun's environment variables), if there are several.

    NeMo's strategy would do so in ``Trainer.fit``: too late for what the ranks have to agree on before, and without the
    timeout of collectives that it is given (2.7). It leaves a process group that exists as it is.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def make_groups(strategy: MegatronStrategy) -> None:
    """Makes Megatron's groups, after the strategy's ``setup_distributed``, where that has left them out.

    It returns as soon as it finds a process group, before the call that makes them.
    """
    if not parallel_state.model_parallel_is_initialized():
        init_model_parallel(strategy.model)
