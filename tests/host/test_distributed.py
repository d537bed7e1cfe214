"""The ranks meet before NeMo lets them, with their own timeout, and Megatron's groups are made all the same."""

from __future__ import annotations

import logging
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo import lightning as nl
from ranks import run_ranks

from nemo_brain.host.distributed import connect, make_groups


def waited() -> float:
    connect(timeout_minutes=3 / 60)
    dist.barrier()
    started = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|timeout"):
            dist.all_reduce(torch.ones(1))
    else:
        time.sleep(6)
    return time.monotonic() - started


def test_a_collective_waits_as_long_as_it_is_told():
    first, _ = run_ranks(waited, 2)
    assert 2 < first < 6  # 3 seconds are what it is told


def grouped() -> int:
    logging.disable(logging.WARNING)
    connect(timeout_minutes=1)
    strategy = nl.MegatronStrategy(tensor_model_parallel_size=2)
    nl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    strategy.setup_distributed()
    assert not parallel_state.model_parallel_is_initialized(), "NeMo makes them itself: make_groups can go"
    make_groups(strategy)
    group = parallel_state.get_tensor_model_parallel_group()
    make_groups(strategy)
    assert parallel_state.get_tensor_model_parallel_group() is group, "made again"
    dist.barrier()  # the store ends with the first rank, and others may still be making a group
    return group.size()


def test_megatrons_groups_are_made_where_nemo_leaves_them_out():
    assert run_ranks(grouped, 2) == [2, 2]
