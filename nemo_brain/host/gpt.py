"""What a Megatron GPT is built with: helpers of NeMo and Megatron that are no interface, and another output layer.

Shapes: T positions, H hidden, V vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt.gpt_model import GPTModel
from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.collections.llm.gpt.model.llama import apply_rope_scaling
from nemo.lightning.base import get_vocab_size


def padded_vocab_size(config: GPTConfig) -> int:
    """The rows of the embedding: ``vocab_size`` and the padding by which it can be split, as NeMo's own models have."""
    return get_vocab_size(config, config.vocab_size, config.make_vocab_size_divisible_by)


def fp8_multiple(config: GPTConfig) -> int:
    """FP8 products take a multiple of this many positions; 1 without FP8."""
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1


def scale_rotary(
    model: GPTModel, factor: float, low_freq_factor: float, high_freq_factor: float, old_context_len: int
) -> None:
    """Scales a model's rotary frequencies as in Llama 3.1.

    NeMo does so in its Llama31Config alone, after Megatron has built the model; Megatron's own ``rope_scaling`` leaves
    all but the first factor at their defaults.
    """
    rotary = model.rotary_pos_emb
    rotary.inv_freq = apply_rope_scaling(rotary.inv_freq, factor, low_freq_factor, high_freq_factor, old_context_len)


def replace_output_layer(model: GPTModel, compute: Callable) -> None:
    """Calls of a last stage's output layer compute something of ours from its weight, which stays where it was.

    The layer is still called through its module, so that hooks on it run: Megatron's overlapped parameter gather waits
    for the weight in one. It takes rows that have been gathered: under sequence parallelism too it is then plainly
    tensor-parallel.
    """
    model.output_layer.forward = compute
    model.output_layer.sequence_parallel = False


def logits(model: GPTModel, hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """What the output layer computes that ``replace_output_layer`` has replaced: this rank's columns [T, V]."""
    return type(model.output_layer).forward(model.output_layer, hidden_TH, weight=weight_VH)[0]
