"""A small GPT on its ranks, prompts to sample for, and how to look at what was sampled."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nemo_brain.core.groups import Group, Prompt, SampledGroup
from nemo_brain.data.stop import Stop
from nemo_brain.host.options import INTERLEAVED
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import load_weights
from nemo_brain.sampling.sampler import SamplingOptions

GPT = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 96,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": True,
    "init_method_std": 0.2,  # a law far from uniform
}
GPT2 = {**GPT, "num_query_groups": 4, "normalization": "LayerNorm", "gated_linear_unit": False}
GPT2 |= {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": False}
VOCAB, END = 37, 5
TOKENIZER = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
PROMPTS = [Prompt(f"p{n}", "", [(7 * n + 3 * i) % VOCAB for i in range(n)]) for n in (4, 1, 9, 6)]
OPTIONS = SamplingOptions(outputs=4, max_new_tokens=70, stop=Stop((END,)))  # the cache grows past its block of 64


def build(gpt: dict, vocab_size: int, tensor=1, stages=1, virtual=None, sequence_parallel=False, divisible=8):
    """This rank's chunks and their config. A rank may call it for several layouts in turn."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, stages, virtual)
    model_parallel_cuda_manual_seed(1)
    config = PackedGPTConfig(
        **gpt,
        **(INTERLEAVED if virtual else {}),
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=divisible,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
    )
    chunks = [config.configure_model(None, vp_stage=stage) for stage in range(virtual or 1)]
    load_weights(chunks, RandomWeights(gpt, vocab_size, tokenizer=None, seed=3))
    return chunks, config


def in_order(sampled: Iterable[tuple[int, SampledGroup]]) -> list[SampledGroup]:
    """The groups in their prompts' order; each comes once."""
    pairs = sorted(sampled, key=lambda pair: pair[0])
    assert [index for index, _ in pairs] == list(range(len(pairs)))
    return [group for _, group in pairs]


def tokens_of(groups: list[Group]) -> list:
    return [[(output.token_ids, output.ended) for output in group.outputs] for group in groups]
