"""A Megatron model beside the one that NeMo trains, with its layout and precision: NeMo's strategies know only one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.lightning import MegatronStrategy
from nemo.lightning._strategy_lib import set_model_parallel_attributes
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides


def with_parallel_layout(config: GPTConfig, strategy: MegatronStrategy) -> GPTConfig:
    """A GPTConfig with the parallel layout and the precision of the strategy's model; it is changed and returned.

    Both functions are what NeMo calls for its own model, and asks for a Lightning module to find the config in.
    """
    holder = SimpleNamespace(config=config, configure_model=config.configure_model)
    config = set_model_parallel_attributes(holder, strategy.parallelism)
    dtypes = getattr(strategy.precision_plugin, "dtype_config", None)  # Lightning's own plugins have none
    return update_config_with_dtype_overrides(dtypes, config) if dtypes else config


def untrained(config: GPTConfig) -> GPTConfig:
    """A copy of a GPTConfig without the hooks by which Megatron's schedules reach the model in training.

    NeMo and DistributedDataParallel set them on the config; a forward pass of another model would reduce gradients and
    gather parameters of the one in training.
    """
    config = copy.copy(config)
    config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
    config.finalize_model_grads_func = config.grad_scale_func = None
    return config


def in_precision(chunk: torch.nn.Module, config: GPTConfig, strategy: MegatronStrategy) -> torch.nn.Module:
    """The chunk in the strategy's precision (Float16Module, FP8), as NeMo converts its own.

    NeMo's precision plugin converts the ``module`` inside a Lightning module; others, such as Lightning's for fp32, are
    not asked.
    """
    if not hasattr(strategy.precision_plugin, "convert_module"):
        return chunk
    holder = torch.nn.Module()
    holder.module, holder.config = chunk, config
    return strategy.precision_plugin.convert_module(holder).module
