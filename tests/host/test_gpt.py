"""Padded vocabulary, alignment for FP8, Llama 3.1's rotary frequencies, an output layer behind its hooks."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from small_models import SMALL, small_config, start
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_brain.host import gpt
from nemo_brain.model.gpt import PackedGPTConfig


@pytest.mark.parametrize(("vocab_size", "tensor", "rows"), [(50, 1, 128), (128, 1, 128), (129, 2, 256), (300, 4, 512)])
def test_the_vocabulary_is_padded_to_what_can_be_split(vocab_size, tensor, rows):
    options = {**SMALL, "vocab_size": vocab_size, "num_attention_heads": 4, "tensor_model_parallel_size": tensor}
    assert gpt.padded_vocab_size(PackedGPTConfig(**options)) == rows


def test_fp8_wants_multiples_of_16_or_32_positions():
    config = PackedGPTConfig(**SMALL)
    assert gpt.fp8_multiple(config) == 1
    config.fp8, config.fp8_recipe = "hybrid", "delayed"
    assert gpt.fp8_multiple(config) == 16
    config.fp8_recipe = "mxfp8"
    assert gpt.fp8_multiple(config) == 32


def scaled() -> None:
    start()
    sizes = dict(hidden_size=128, num_attention_heads=1, rotary_base=500000)
    factors = dict(scale_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192)
    chunk = small_config(**sizes, **factors).configure_model()
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_theta=500000.0, rope_scaling=scaling)
    expected = LlamaRotaryEmbedding(llama).inv_freq
    torch.testing.assert_close(chunk.rotary_pos_emb.inv_freq, expected, rtol=1e-6, atol=0)  # fp32
    plain = small_config(**sizes).configure_model().rotary_pos_emb.inv_freq
    assert (plain / expected).max() > 7.9  # the slowest frequencies are divided by the factor


def test_rotary_frequencies_are_scaled_as_in_llama_3_1():
    run_ranks(scaled, 1)


def replaced() -> None:
    start()
    chunk = small_config().configure_model()
    hidden = torch.randn(3, SMALL["hidden_size"])
    called = []
    chunk.output_layer.register_forward_pre_hook(lambda *_: called.append("hook"))
    gpt.replace_output_layer(chunk, lambda hidden: called.append("ours") or hidden)
    assert chunk.output_layer(hidden) is hidden and called == ["hook", "ours"]
    weight = chunk.output_layer.weight
    torch.testing.assert_close(gpt.logits(chunk, hidden, weight), hidden @ weight.T, rtol=0, atol=1e-6)  # fp32
    assert called == ["hook", "ours"]


def test_the_output_layer_is_replaced_behind_its_hooks():
    """Megatron's overlapped gather of parameters waits in such a hook."""
    run_ranks(replaced, 1)
