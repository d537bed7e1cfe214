"""Rotary embeddings by the Triton kernel: Megatron's values and gradients. On a CPU Triton's interpreter runs it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cards import DEVICE, ON_CARD
from compiled_kernels import compiled
from ranks import run_ranks
from small_models import small_config, start

from nemo_brain.host import options
from nemo_brain.training import model as training_model

pytest.importorskip("triton")
from nemo_brain.model import rotary_kernel

SIZES = [(1, 64, 64), (9, 16, 4), (3, 20, 12), (2, 6, 2)]


def close(device: torch.device, heads: int, channels: int, turned: int) -> bool:
    """Rounding of values up to 4 in one operation; cosines and sines of hundreds of radians."""
    bounds = {torch.float32: 2e-6, torch.bfloat16: 4e-2}
    return all(rotary_kernel.largest_gap(device, dtype, heads, channels, turned) < bounds[dtype] for dtype in bounds)


@pytest.mark.skipif(ON_CARD and torch.cuda.is_available(), reason="the next test runs it on the card")
@pytest.mark.parametrize(("heads", "channels", "turned"), SIZES)
def test_values_and_gradients_are_float64s(heads, channels, turned):
    assert close(torch.device("cpu"), heads, channels, turned)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "channels", "turned"), SIZES)
def test_on_a_card_values_and_gradients_are_float64s(heads, channels, turned):
    assert close(DEVICE, heads, channels, turned)


def test_a_kernel_that_turns_the_wrong_way_is_told():
    turned = rotary_kernel._turned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary_kernel, "_turned", lambda t, freqs, back: turned(t, freqs, back=False))
        assert rotary_kernel.largest_gap(torch.device("cpu"), torch.float32) > 0.1


def gradients(fused: bool) -> tuple[int, list[torch.Tensor]]:
    """How often the kernel ran, and a model's hidden states and gradients."""
    start()
    calls = []
    if fused:
        options.give_fused_rotary(
            lambda *args, **kwargs: calls.append(1) or rotary_kernel.apply_rotary(*args, **kwargs)
        )
    torch.manual_seed(1)
    model = small_config(apply_rope_fusion=fused, num_query_groups=1, rotary_percent=0.5).configure_model()
    tokens = torch.randint(50, (1, 12))
    positions = torch.tensor([[*range(4), *range(4, 8), *range(4, 8)]])  # two outputs behind one prompt
    hidden = model.trunk(tokens, positions, torch.tensor([[4, 4, 4]]))
    hidden.square().sum().backward()
    return len(calls), [hidden.detach(), *(parameter.grad for parameter in model.decoder.parameters())]


def test_a_models_gradients_are_those_without_it():
    ((calls, fused),), ((none, plain),) = (run_ranks(gradients, 1, fused) for fused in (True, False))
    assert calls == 2 * 2 and not none, "queries and keys of two layers"
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # fp32


@pytest.mark.parametrize(
    ("packaged", "usable", "expected"), [(max, True, max), (None, True, "ours"), (None, False, None)]
)
def test_it_is_used_on_a_card_where_it_works_and_nobody_elses_is_there(packaged, usable, expected, monkeypatch):
    slot = "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb"
    monkeypatch.setattr(slot, packaged)
    training_model.provide_fused_rotary()
    assert options.rope_utils.fused_apply_rotary_pos_emb is packaged, "nothing without a card"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(rotary_kernel, "problem", lambda device: None if usable else "wrong")
    training_model._rotary_kernel.cache_clear()
    with contextlib.nullcontext() if usable else pytest.warns(UserWarning, match="many small operations: wrong"):
        training_model.provide_fused_rotary()
    training_model._rotary_kernel.cache_clear()
    expected = rotary_kernel.apply_rotary if expected == "ours" else expected
    assert options.rope_utils.fused_apply_rotary_pos_emb is expected
    assert options.gpt_options(False, {}).get("apply_rope_fusion", False) is (expected is not None)


def test_a_kernel_that_gives_nan_is_told(monkeypatch):
    assert rotary_kernel.problem(torch.device("cpu")) is None
    turned = rotary_kernel._turned
    monkeypatch.setattr(
        rotary_kernel, "_turned", lambda t, freqs, back: turned(t * (torch.nan if back else 1), freqs, back)
    )
    assert "nan away from float64" in rotary_kernel.problem(torch.device("cpu"))


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemo_brain.model.rotary_kernel import _turn
numbers = ("stride_s", "stride_b", "stride_h", "stride_d", "rows", "heads", "channels", "half")
for capability in (80, 90, 100):
    for dtype in ("*fp32", "*bf16"):
        for back in (False, True):
            sizes = dict(BACK=back, HEADS=8, WIDTH=64)
            signature = {"t": dtype, "freqs": "*fp32", "out": dtype, **dict.fromkeys(numbers, "i32")}
            source = ASTSource(_turn, signature=signature | dict.fromkeys(sizes, "constexpr"), constexprs=sizes)
            compiled = compile(source, target=GPUTarget("cuda", capability, 32))
            print(len(compiled.asm["cubin"]), compiled.asm["ptx"].count("cos.approx"))
"""


def test_the_kernel_compiles_for_cards(tmp_path):
    """Ampere, Hopper and Blackwell; with cosines that are exact for hundreds of radians."""
    sizes = [[int(number) for number in line.split()] for line in compiled(COMPILE, tmp_path)]
    assert len(sizes) == 12 and all(size > 0 and not approximate for size, approximate in sizes), sizes
