"""The settings that NeMo and Megatron need from us do what they are set for."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter
from nemo.lightning.pytorch.strategies.utils import fix_progress_bar
from ranks import run_ranks
from small_models import SMALL, small_config, start
from torch.nn import functional

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
    options = gpt_options(False, SMALL)
    assert PackedGPTConfig(**SMALL, **options).variable_seq_lengths
    with pytest.raises(ValueError, match="alltoall"):
        PackedGPTConfig(**SMALL, **{**options, "moe_token_dispatcher_type": "allgather"})


SWIGLU = {"gated_linear_unit": True, "activation_func": functional.silu, "add_bias_linear": False}


@pytest.mark.parametrize(
    ("gpt", "fused"),
    [
        (SWIGLU, True),
        ({**SWIGLU, "activation_func": functional.gelu}, False),
        ({**SWIGLU, "activation_func": functional.gelu, "gated_linear_unit": False}, False),
        ({**SWIGLU, "activation_func_clamp_value": 7.0}, False),
    ],
    ids=["SwiGLU", "GEGLU", "GELU", "clamped"],
)
def test_what_megatron_fuses_on_a_card_is_what_it_computes_exactly(gpt, fused, monkeypatch):
    assert "bias_activation_fusion" not in gpt_options(False, gpt)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = gpt_options(False, gpt)
    assert options.get("bias_activation_fusion", False) is fused
    assert "gradient_accumulation_fusion" not in options, "NeMo's default: where Apex's kernel is installed"
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", max)
    assert gpt_options(False, gpt)["apply_rope_fusion"] is True
    assert "apply_rope_fusion" not in gpt_options(False, {**gpt, "rotary_interleaved": True})


def mlp_gradients(fused: bool) -> list[torch.Tensor]:
    """A layer's output and gradients, by Megatron's own backward of SwiGLU where it is fused."""
    torch.compiler.set_stance("force_eager")
    start()
    torch.manual_seed(1)
    model = small_config(**SWIGLU, bias_activation_fusion=fused).configure_model()
    mlp = model.decoder.layers[0].mlp
    hidden = torch.randn(7, 1, model.config.hidden_size, requires_grad=True)
    output, _ = mlp(hidden)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, *(parameter.grad for parameter in mlp.parameters())]


def test_the_fused_swiglu_has_the_values_and_gradients_of_the_plain_one():
    (fused,), (plain,) = (run_ranks(mlp_gradients, 1, fused) for fused in (True, False))
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)  # another order of the products, in fp32
    assert not all(torch.equal(one, other) for one, other in zip(fused, plain, strict=True)), "it is another backward"
