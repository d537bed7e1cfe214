"""A second model has the layout and the precision of the one in training, and none of its hooks."""

from __future__ import annotations

import torch
from nemo import lightning as nl
from ranks import run_ranks
from small_models import SMALL, small_config, start

from nemo_brain.host import second_model
from nemo_brain.host.gpt import padded_vocab_size
from nemo_brain.host.options import STRATEGY_OPTIONS, gpt_options
from nemo_brain.model.gpt import PackedGPTConfig


def beside() -> None:
    start(tensor=2)
    strategy = nl.MegatronStrategy(tensor_model_parallel_size=2, sequence_parallel=True, **STRATEGY_OPTIONS)
    plugin = nl.MegatronMixedPrecision(
        precision="bf16-mixed", params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, autocast_enabled=False
    )
    nl.Trainer(accelerator="cpu", devices=2, strategy=strategy, plugins=[plugin], logger=False)
    config = PackedGPTConfig(**SMALL, **gpt_options(False, SMALL))
    config = second_model.with_parallel_layout(config, strategy)
    assert (config.tensor_model_parallel_size, config.sequence_parallel) == (2, True)
    assert (config.bf16, config.params_dtype) == (True, torch.bfloat16)
    config.no_sync_func = config.finalize_model_grads_func = config.grad_scale_func = print
    free = second_model.untrained(config)
    assert free.no_sync_func is free.finalize_model_grads_func is free.grad_scale_func is None
    assert config.no_sync_func is print
    chunk = free.configure_model()
    assert chunk.embedding.word_embeddings.weight.shape[0] * 2 == padded_vocab_size(free)
    converted = second_model.in_precision(chunk, free, strategy)
    assert converted.module is chunk  # in Float16Module, which casts what enters and leaves
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}


def test_a_second_model_has_layout_and_precision_of_the_first_and_none_of_its_hooks():
    run_ranks(beside, 2)


def in_fp32() -> None:
    start()
    strategy = nl.MegatronStrategy(**STRATEGY_OPTIONS)
    nl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    config = second_model.with_parallel_layout(small_config(), strategy)
    chunk = config.configure_model()
    assert second_model.in_precision(chunk, config, strategy) is chunk


def test_a_second_model_in_fp32_stays_as_it_is():
    run_ranks(in_fp32, 1)
