"""Layers have our attention, and norms that Megatron's own layers lack."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks
from small_models import SMALL, small_config, start

from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE, Norm
from nemo_brain.host.parallel_residual import ParallelResidualLayer

LAYOUT = torch.tensor([[3, 4]])  # a prompt of 3 positions, an output of 4
TINY = dict(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_the_norm_is_torchs(kind):
    config = TransformerConfig(**TINY, normalization=kind)
    ours, theirs = Norm(config, 8, eps=1e-3), WrappedTorchNorm(config, 8, eps=1e-3)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.linspace(0.5, 2, 8))
    hidden = torch.randn(5, 1, 8)
    assert torch.equal(ours(hidden), theirs(hidden))


def test_the_norm_is_marked_for_sequence_parallelism_which_megatrons_refuses():
    config = TransformerConfig(**TINY, tensor_model_parallel_size=2, sequence_parallel=True)
    assert all(parameter.sequence_parallel for parameter in Norm(config, 8).parameters())
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config, 8)


def layers(parallel_residual: bool) -> None:
    start()
    chunk = small_config(parallel_residual=parallel_residual, qk_layernorm=True).configure_model()
    assert len(chunk.decoder.layers) == SMALL["num_layers"]
    for layer in chunk.decoder.layers:
        assert type(layer.self_attention.core_attention).__name__ == "GroupAttention"
        if not HAVE_TRANSFORMER_ENGINE:
            attention = layer.self_attention
            norms = [layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm]
            assert {type(norm) for norm in norms} == {Norm}
    layer = chunk.decoder.layers[0]
    assert isinstance(layer, ParallelResidualLayer) == parallel_residual
    hidden = torch.randn(7, 1, SMALL["hidden_size"])
    out, _ = layer(hidden, attention_mask=LAYOUT)
    attended, bias = layer.self_attention(layer.input_layernorm(hidden), attention_mask=LAYOUT)
    attended = attended + bias
    computed, bias = layer.mlp(layer.pre_mlp_layernorm(hidden if parallel_residual else hidden + attended))
    # fp32 sums in another order
    torch.testing.assert_close(out, hidden + attended + computed + bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parallel_residual", [False, True])
def test_layers_have_our_attention_and_compute_their_residuals(parallel_residual):
    run_ranks(layers, 1, parallel_residual)
