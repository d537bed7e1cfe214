"""A small GPT of one rank, wrapped and optimized as NeMo does it, without a trainer."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from nemo.core.optim import McoreDistributedOptimizer

from nemo_brain.host.options import gpt_options
from nemo_brain.model.gpt import PackedGPTConfig, PackedGPTModel

SMALL = dict(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, seq_length=32, vocab_size=50)


def start(tensor: int = 1, pipeline: int = 1) -> None:
    """Megatron's groups on the ranks that ``run_ranks`` started."""
    logging.disable(logging.WARNING)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(1)


def small_config(**options) -> PackedGPTConfig:
    sizes = dict(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return PackedGPTConfig(**{**SMALL, **gpt_options(False, SMALL), **sizes, **options})


def trainable(distributed: bool, seed: int = 1, **options) -> tuple[PackedGPTModel, McoreDistributedOptimizer]:
    """A chunk in Megatron's DDP, and NeMo's wrapper of Megatron's optimizer of it."""
    config = small_config(**options)
    torch.manual_seed(seed)
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), config.configure_model()
    )
    optim = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        clip_grad=1.0,
        params_dtype=torch.float32,
        use_distributed_optimizer=distributed,
    )
    return wrapped, McoreDistributedOptimizer(get_megatron_optimizer(optim, [wrapped]))


def fill_gradients(wrapped: DistributedDataParallel, value: float) -> None:
    """As a backward pass and its reduction leave them."""
    for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
        buffer.grad_data.fill_(value)


def weights_and_states(wrapped, optimizer: McoreDistributedOptimizer) -> torch.Tensor:
    parts = [parameter.detach().flatten() for parameter in wrapped.parameters()]
    for inner in optimizer.mcore_optimizer.chained_optimizers:
        states = inner.optimizer.state.values()
        parts += [state[name].flatten().float() for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
    return torch.cat(parts)
