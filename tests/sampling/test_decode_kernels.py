"""Sampling on a card, as far as a CPU shows it: the attention of decoding as a kernel, its graph recorded and replayed.

In the place of a CUDA graph stands a recording of torch's operations, which is replayed on the same tensors.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cards import DEVICE, ON_CARD
from compiled_kernels import compiled
from ranks import run_ranks
from sampled_gpts import GPT, OPTIONS, PROMPTS, TOKENIZER, VOCAB, build, in_order, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_brain.data.stop import Stop
from nemo_brain.sampling import decode_kernels
from nemo_brain.sampling import sampler as sampler_module
from nemo_brain.sampling.sampler import Sampler

pytest.importorskip("triton")


@pytest.mark.parametrize(("per_kv", "width"), [(1, 80), (4, 64), (3, 16)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_the_kernels_attention_is_float64s(dtype, bound, per_kv, width):
    """Prompts and outputs of none to several blocks. Rounding to the dtype, of values of size one."""
    assert decode_kernels.largest_gap(torch.device("cpu"), dtype, per_kv, width) < bound


@pytest.mark.gpu
@pytest.mark.parametrize(("per_kv", "width"), [(1, 80), (4, 64), (4, 128), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_card_the_kernels_attention_is_float64s(dtype, per_kv, width):
    if not (ON_CARD or dtype != torch.bfloat16):
        pytest.skip("Triton's interpreter has no products of bfloat16")
    assert decode_kernels.problem(DEVICE, dtype, per_kv, width) is None


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemo_brain.sampling.decode_kernels import _attend
for capability in (80, 90, 100):
    for dtype, block, precision in (("fp32", 32, "ieee"), ("bf16", 64, "tf32")):
        tensors = ("q", "k", "v", "prompt_keys", "prompt_values", "keys", "values", "out")
        signature = {name: f"*{dtype}" for name in tensors}
        signature |= dict(group="*i64", prompt_length="*i64", length="*i64")
        signature |= dict(prompt_size="i32", output_size="i32", scale="fp32")
        sizes = dict(KV_HEADS=8, PER_KV=4, WIDTH=128, QUERIES=16, COLUMNS=128, BLOCK=block, PRECISION=precision)
        source = ASTSource(_attend, signature=signature | dict.fromkeys(sizes, "constexpr"), constexprs=sizes)
        print(compile(source, target=GPUTarget("cuda", capability, 32)).metadata.shared)
"""


def test_the_kernel_compiles_for_cards_and_fits_their_shared_memory(tmp_path):
    """Ampere (163 KiB of it), Hopper and Blackwell (227 KiB), with heads of 128."""
    shared = [int(size) for size in compiled(COMPILE, tmp_path)]
    assert len(shared) == 6 and max(shared) < 163 * 1024


class Recording(TorchDispatchMode):
    """The operations of a call, on the tensors that they had. Recording makes them, so the first replay is none."""

    def __init__(self, call):
        super().__init__()
        self.operations: list[tuple] = []
        self.replays = -1
        with self:
            call()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        if self.replays:
            for function, args, kwargs, out in self.operations:
                again = function(*args, **kwargs)
                if not function.is_view and not function._schema.is_mutable:
                    for old, new in zip(_tensors(out), _tensors(again), strict=True):
                        old.copy_(new)


def _tensors(out) -> list[torch.Tensor]:
    return [part for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, torch.Tensor)]


def attend(q_RHD, k_RKD, v_RKD, prompt, output, held_3R, scale):
    """What the kernel computes, by operations that read no number."""
    group_R, seen_R, own_R = held_3R
    rows = torch.arange(len(q_RHD))
    for buffer, new_RKD in zip(output, (k_RKD, v_RKD), strict=True):
        buffer[rows, :, own_R] = new_RKD
    keys, values = (torch.cat([prompt[i][group_R], output[i][: len(rows)]], dim=2) for i in range(2))
    absent = [torch.arange(buffer.shape[2]) for buffer in (prompt[0], output[0])]
    absent_RT = torch.cat([absent[0] >= seen_R[:, None], absent[1] > own_R[:, None]], dim=1)
    q_RKMD = q_RHD.unflatten(1, (k_RKD.shape[1], -1))
    scores = (q_RKMD @ keys.transpose(2, 3) * scale).masked_fill(absent_RT[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).flatten(1, 2)


def sampled(kernel: bool, steps: tuple[int, ...], changes: dict, **options) -> tuple[list, list]:
    """Groups with each number of tokens at a time, the first without a kernel; and the recordings of the others."""
    chunks, config = build(GPT | changes, VOCAB)
    given = replace(OPTIONS, stop=Stop((5, 11, 17, 23)), **options)
    found, recordings = [], []
    for number, count in enumerate(steps):
        sampler_module.kernel_usable = lambda device, config, used=number > 0: used
        sampler = Sampler(chunks, config, TOKENIZER, replace(given, steps=count))
        if number and not kernel:
            decode_kernels.attend = attend
            sampler._records = True
            sampler._recorded = lambda call: recordings.append(Recording(call)) or recordings[-1]
        found.append(in_order(sampler.sample(PROMPTS, 1, 2)))
    return found, [(recording.replays, len(recording.operations)) for recording in recordings]


def same(others: list, one: list) -> None:
    for other in others:
        assert tokens_of(other) == tokens_of(one)
        for ours, theirs in zip(other, one, strict=True):
            for name in ("proposal_logprobs", "policy_logprobs"):
                # fp32, of up to 40 tokens: products of other shapes, sums in another order.
                np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-4)


def test_the_kernel_samples_the_same_outputs():
    """Rows end, prompts join, and more rows are computed than there are."""
    options = {"outputs": 3, "max_new_tokens": 6, "rows_in_flight": 6}
    ((one, *others), _), *_ = run_ranks(sampled, 1, True, (1, 3), {"num_layers": 1}, **options)
    assert len({len(output.token_ids) for group in one for output in group.outputs}) > 2
    same(others, one)


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.4}, {"top_k": 9, "top_p": 0.9}])
def test_a_recorded_step_is_replayed_as_rows_end_and_join_and_caches_grow(changes):
    options = {"max_new_tokens": 70, "rows_in_flight": 8, **changes}
    ((one, *others), recordings), *_ = run_ranks(sampled, 1, False, (1, 4, 16), {}, **options)
    assert len({len(output.token_ids) for group in one for output in group.outputs}) > 5
    same(others, one)
    replays = [count for count, _ in recordings]
    # Recorded anew only when a cache's buffers have grown, or the rows come to another multiple of 16.
    assert sum(replays) > 8 * len(replays) and min(replays) > 0
