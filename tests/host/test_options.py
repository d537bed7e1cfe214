"""The settings that NeMo and Megatron need from us do what they are set for."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter
from nemo.lightning.pytorch.strategies.utils import fix_progress_bar
from small_models import SMALL

from nemo_brain.host.options import STRATEGY_OPTIONS, gpt_options
from nemo_brain.model.gpt import PackedGPTConfig


def test_lightnings_progress_bar_is_not_replaced_by_one_that_gathers():
    def bar(replace: bool) -> pl.Callback:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[TQDMProgressBar()])
        fix_progress_bar(trainer, replace, 1)
        (bar,) = (callback for callback in trainer.callbacks if isinstance(callback, ProgressBar))
        return bar

    assert isinstance(bar(True), ProgressPrinter)
    assert not isinstance(bar(STRATEGY_OPTIONS["replace_progress_bar"]), ProgressPrinter)


def sharding(**options) -> str:
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return nl.MegatronStrategy(ddp=ddp, **options).sharded_state_dict_metadata["distrib_optim_sharding_type"]


def test_states_of_a_distributed_optimizer_can_be_read_in_another_layout():
    assert sharding(**STRATEGY_OPTIONS) == "fully_reshardable"
    assert sharding() == "dp_reshardable"


def test_rows_may_differ_in_length_with_this_dispatcher_only():
    options = gpt_options(virtual_stages=False)
    assert PackedGPTConfig(**SMALL, **options).variable_seq_lengths
    with pytest.raises(ValueError, match="alltoall"):
        PackedGPTConfig(**SMALL, **{**options, "moe_token_dispatcher_type": "allgather"})
