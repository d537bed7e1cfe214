"""Megatron's distributed checkpoints without helper processes, and loadable where Adam is torch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from nemo.lightning.io import pl as nemo_io
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

_STEP = "common_step"  # Megatron's key


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by each rank itself: ``save`` takes the tensors, ``write`` writes them.

    Megatron's own synchronous save starts a server and writers for every rank, which outlive a rank that is killed; so
    do the writers of its asynchronous one.

    Args:
        copy: what is taken is copied to host memory, so that training may go on before it is written.
    """

    def __init__(self, copy: bool):
        super().__init__("torch_dist", 1)
        self._copy = copy
        self._taken: tuple[dict, str] | None = None

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        sharded_state_dict, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        if self._copy:
            _copy_to_host(sharded_state_dict)
        self._taken = mcore_to_pyt_state_dict(sharded_state_dict, False), str(checkpoint_dir)

    def write(self, group: dist.ProcessGroup | None) -> None:
        """A collective of the group of all ranks.

        Raises:
            OSError: on every rank, when a file could not be written on one of them.
            Exception: on every rank, what else went wrong on one of them.
        """
        assert self._taken is not None, "save comes first"
        (state, directory), self._taken = self._taken, None
        try:
            torch_checkpoint.save(
                state,
                storage_writer=torch_checkpoint.FileSystemWriter(directory),
                planner=MCoreSavePlanner(
                    dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
                ),
                process_group=group,
            )
        except CheckpointException as error:  # on every rank, with what failed on some of them; no Exception
            rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
            # torch's archives say in this way that less was written than they had given.
            if isinstance(failure, OSError) or "inline_container" in str(failure):
                raise OSError(f"rank {rank}: {failure}") from error
            raise failure from error


def save_with(checkpoint_io: Any, saver: InProcessSave) -> None:
    """Makes NeMo's ``MegatronCheckpointIO`` give its tensors to ``saver``; with replicas, each a share of them.

    It chooses between Megatron's own savers by itself, the first time it saves, and has no argument for another.
    """
    save: SaveShardedStrategy = saver
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if replicas.size() > 1:  # each writes its share of what all of them hold
        save = FullyParallelSaveStrategyWrapper(save, replicas)
    checkpoint_io._save_sharded_strategy = save


def share_step(optimizer_state: dict) -> dict:
    """The state that is to be saved, with the number of steps where this rank's optimizer has nothing to train.

    Megatron saves it among what all ranks have in common, which rank 0 writes: of a first pipeline stage whose layers
    are all frozen, a checkpoint would lack it. A collective of all ranks.
    """
    inner = optimizer_state.get("optimizer", optimizer_state)
    state = inner.get("state") if isinstance(inner, dict) else None
    steps: list = [None] * dist.get_world_size()
    dist.all_gather_object(steps, state.get(_STEP) if isinstance(state, dict) else None)
    known = [step for step in steps if step is not None]
    if known and isinstance(state, dict):
        state.setdefault(_STEP, known[0])
    return optimizer_state


def _copy_to_host(state: dict[str, list]) -> None:
    cuda = torch.cuda.is_available()
    for tensor in (item for items in state.values() for item in items if isinstance(item, ShardedTensor)):
        tensor.data = torch.empty_like(tensor.data, device="cpu", pin_memory=cuda).copy_(tensor.data, non_blocking=cuda)
    if cuda:
        torch.cuda.synchronize()


@contextlib.contextmanager
def loading(optimizers: Sequence[MegatronOptimizer]) -> Iterator[None]:
    """Around NeMo's loading of weights.

    Without CUDA, NeMo's move of what it has loaded to "the" CUDA device is left out. Without Apex and Transformer
    Engine, Megatron's distributed optimizer asks torch's Adam for a step count before there is one: every optimizer
    makes a step of length zero first, whose states are then overwritten.
    """
    if not HAVE_APEX_OR_TE:
        for inner in _inner(optimizers):
            _allocate(inner.optimizer)
    fix_device = nemo_io._fix_tensors_device
    if not torch.cuda.is_available():
        nemo_io._fix_tensors_device = lambda checkpoint: checkpoint
    try:
        yield
    finally:
        nemo_io._fix_tensors_device = fix_device


@contextlib.contextmanager
def loading_optimizers(optimizers: Sequence[MegatronOptimizer]) -> Iterator[None]:
    """Around NeMo's loading of optimizer states.

    Without Apex and Transformer Engine, Megatron's distributed optimizer looks for torch Adam's step count among the
    tensors that it has gathered, and gives all parameters one and the same tensor to count in.
    """
    if HAVE_APEX_OR_TE:
        yield
        return
    distributed = [inner for inner in _inner(optimizers) if isinstance(inner, DistributedOptimizer)]
    for inner in distributed:
        inner._set_main_param_and_optimizer_states = _with_step(inner)
    yield
    for inner in distributed:
        del inner._set_main_param_and_optimizer_states
        for state in inner.optimizer.state.values():
            state["step"] = state["step"].clone()


def _inner(optimizers: Sequence[MegatronOptimizer]) -> Iterator:
    for optimizer in optimizers:
        yield from optimizer.mcore_optimizer.chained_optimizers


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    if optimizer.state or not isinstance(optimizer, torch.optim.AdamW):
        return
    saved = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, (lr, weight_decay) in zip(optimizer.param_groups, saved, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay


def _with_step(inner: DistributedOptimizer) -> Callable[[torch.Tensor, dict], None]:
    original = inner._set_main_param_and_optimizer_states

    def load(model_param: torch.Tensor, tensors: dict) -> None:
        group, order = inner.model_param_group_index_map[model_param]
        state = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][order]]
        original(model_param, {**tensors, "step": state["step"]})

    return load
