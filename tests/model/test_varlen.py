"""Which variable-length attention kernel is taken: by what it can do."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen

from nemo_brain.model import varlen
from nemo_brain.model.varlen import choose_kernel, sequences

Q, KV = torch.zeros(6, 4, 8), torch.zeros(9, 2, 8)  # positions, heads, width
ROW = sequences(((0, 3, (2, 1)),), torch.device("cpu"))


class Called(Exception):
    """What a kernel was called with."""


# The signatures of torch 2.10, 2.11 and 2.13.


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    raise Called({"scale": scale, "window_size": window_size, "longest": (max_q, max_k)})


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    raise Called({"scale": scale, "window_size": window_size, "longest": (max_q, max_k), "enable_gqa": enable_gqa})


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    raise Called({"scale": softmax_scale, "causal": causal, "longest": (max_seqlen_q, max_seqlen_k)})


@pytest.fixture
def installed(monkeypatch):
    """Puts a flash-attn of a version (None: none) and torch's function (None: none) in place."""

    def install(flash: str | None, torchs) -> None:
        module = types.ModuleType("flash_attn")
        module.__version__, module.flash_attn_varlen_func = flash, flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", module if flash else None)
        if torchs is None:
            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
        else:
            monkeypatch.setattr(torch_varlen, "varlen_attn", torchs)

    return install


def call(kernel) -> dict:
    with pytest.raises(Called) as called:
        kernel(Q, KV, KV, ROW, 0.5)
    return called.value.args[0]


LONGEST = (3, 5)  # queries: the prefix; keys: the prefix and a segment


def test_flash_attn_comes_first(installed):
    installed("2.7.4.post1", torch_2_13)
    kernel, said = choose_kernel()
    assert said == "flash-attn 2.7.4.post1"
    assert call(kernel) == {"scale": 0.5, "causal": True, "longest": LONGEST}


@pytest.mark.parametrize("flash", [None, "2.0.9", "1.0"])
@pytest.mark.parametrize("torchs, told", [(torch_2_11, {}), (torch_2_13, {"enable_gqa": True})])
def test_torchs_kernel_is_taken_from_2_11_on_where_flash_attn_is_missing_or_aligns_upper_left(
    installed, flash, torchs, told
):
    """2.11 has no option for grouped queries, and shares keys and values without it."""
    installed(flash, torchs)
    kernel, said = choose_kernel()
    assert said == f"torch's varlen_attn {torch.__version__}"
    assert call(kernel) == {"scale": 0.5, "window_size": (-1, 0), "longest": LONGEST, **told}


@pytest.mark.parametrize(
    "flash, torchs, reasons",
    [
        (None, torch_2_10, ["flash-attn: ", "has no window_size: 2.11 or later is needed"]),
        ("2.0.9", torch_2_10, ["flash-attn: 2.0.9 aligns causality at the upper left corner", "no window_size"]),
        (None, None, ["flash-attn: ", "torch's varlen_attn: "]),
    ],
)
def test_where_no_kernel_will_do_it_says_why(installed, flash, torchs, reasons):
    installed(flash, torchs)
    kernel, said = choose_kernel()
    assert kernel is None and all(reason in said for reason in reasons)


def test_the_choice_is_said_once_and_a_lack_of_one_is_a_warning(installed, capsys):
    varlen._announced.cache_clear()
    installed("2.7.4", torch_2_13)
    assert varlen._announced() is varlen._announced() is not None
    assert capsys.readouterr().err == "attention: flash-attn 2.7.4\n"
    varlen._announced.cache_clear()
    installed(None, torch_2_10)
    with pytest.warns(UserWarning, match="block by block, several times slower, for want of .* 2.11 or later"):
        assert varlen._announced() is None
    varlen._announced.cache_clear()


def test_the_cpu_takes_none():
    assert varlen.find_kernel(torch.zeros(1, dtype=torch.bfloat16)) is None
