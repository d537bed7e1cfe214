"""NeMo's adapters fit Megatron's linear layers, also where NeMo itself cannot describe these."""

from __future__ import annotations

import pytest
import torch
from nemo.collections.llm.peft.utils import get_adapter_attributes_from_linear
from ranks import run_ranks
from small_models import small_config, start

from nemo_brain.host.adapters import make_adapter
from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE


def adapted(gated: bool) -> None:
    start()
    chunk = small_config(gated_linear_unit=gated, add_bias_linear=False).configure_model()
    layer = chunk.decoder.layers[0]
    for owner, name in [
        (layer.self_attention, "linear_qkv"),
        (layer.self_attention, "linear_proj"),
        (layer.mlp, "linear_fc1"),
        (layer.mlp, "linear_fc2"),
    ]:
        linear = getattr(owner, name)
        if not HAVE_TRANSFORMER_ENGINE:
            with pytest.raises(TypeError, match="isinstance"):
                get_adapter_attributes_from_linear(linear)
        adapter = make_adapter(linear, name, dim=4, alpha=8)
        outputs, inputs = linear.weight.shape
        first, second = adapter.linear_in.weight, adapter.linear_out.weight
        assert (tuple(first.shape), tuple(second.shape)) == ((4, inputs), (outputs, 4))
        with torch.no_grad():
            second.normal_()
        hidden = torch.randn(3, 1, inputs)
        # alpha / dim is 2; fp32
        torch.testing.assert_close(adapter(hidden), 2 * hidden @ first.T @ second.T, rtol=1e-5, atol=1e-6)
        assert adapter.base_linear_name == (name if gated else "")


@pytest.mark.parametrize("gated", [False, True])
def test_adapters_fit_every_linear_layer(gated):
    run_ranks(adapted, 1, gated)
