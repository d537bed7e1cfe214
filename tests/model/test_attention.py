"""Attention over packed rows against one dense mask in float64.

Shapes: H query heads, K key-value heads, S positions of a row, D head width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cards import DEVICE, ON_CARD
from devices import Operations
from qkv import D, H, dense, draw

from nemo_brain.model import attention, prefix_attention
from nemo_brain.model.attention import packed_attention
from nemo_brain.model.prefix_attention import largest_gaps

LAYOUTS = {
    "unequal segments": [[3, 2, 4, 1]],
    "equal segments": [[2, 3, 3, 3]],
    "no prefix": [[0, 5, 2, 3]],
    "one segment": [[4, 6]],
    "prefix of one": [[1, 1, 2]],
    "only prefixes": [[5], [1], [7]],
    "blocks and padding": [[3, 2, 4, 1], [0, 5, 2, 0], [2, 2, 2, 0], [4, 1, 0, 0], [3, 0, 0, 0]],
}


def visible(layout: list[list[int]]) -> torch.Tensor:
    """The dense mask [S, S]: same block, not later, and in the prefix or in the own segment."""
    block, segment = [], []
    for index, lengths in enumerate(layout):
        block += [index] * sum(lengths)
        segment += [part for part, length in enumerate(lengths) for _ in range(length)]
    block, segment = torch.tensor(block), torch.tensor(segment)
    allowed = (block[:, None] == block) & ((segment[:, None] == segment) | (segment == 0))
    return allowed & torch.ones_like(allowed).tril()


def one_by_one(q_SHD, k_MKD, v_MKD, sequences, scale) -> torch.Tensor:
    """What a variable-length flash-attention kernel promises: sequence by sequence, causal from the lower right."""
    outs = []
    queries, keys = sequences.lengths.query_ends.tolist(), sequences.lengths.key_ends.tolist()
    assert sequences.lengths.query_ends.dtype == sequences.lengths.key_ends.dtype == torch.int32
    for n in range(len(queries) - 1):
        q, k, v = (
            tensor[ends[n] : ends[n + 1]].transpose(0, 1)
            for tensor, ends in ((q_SHD, queries), (k_MKD, keys), (v_MKD, keys))
        )
        assert q.shape[1] <= sequences.lengths.longest_query and k.shape[1] <= sequences.lengths.longest_key
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outs.append(dense(q, k, v, mask, scale or D**-0.5).transpose(0, 1))
    return torch.cat(outs)


class SlowKernel:
    """A variable-length kernel and its backward pass, which takes the output and the lse that it is given."""

    def forward(self, q, k, v, lengths, causal, scale):
        outs, lses = [], []
        for _, _, (_, _, v_HSD), scores in self._sequences(q, k, v, lengths, causal, scale):
            outs.append((scores.softmax(-1) @ v_HSD).transpose(0, 1))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, dim=1)

    def backward(self, d_out, q, k, v, out, lse, lengths, causal, scale):
        gradients = [torch.zeros_like(tensor) for tensor in (q, k, v)]
        for queries, keys, (q_HSD, k_HSD, v_HSD), scores in self._sequences(q, k, v, lengths, causal, scale):
            probs = (scores - lse[:, queries, None]).exp()
            d_HSD = d_out[queries].transpose(0, 1)
            drift = (d_HSD * out[queries].transpose(0, 1)).sum(-1, keepdim=True)
            d_scores = probs * (d_HSD @ v_HSD.transpose(1, 2) - drift) * scale
            shares = (d_scores @ k_HSD, d_scores.transpose(1, 2) @ q_HSD, probs.transpose(1, 2) @ d_HSD)
            for gradient, place, share in zip(gradients, (queries, keys, keys), shares, strict=True):
                heads = gradient.shape[1]
                gradient[place] += share.unflatten(0, (heads, -1)).sum(1).transpose(0, 1)
        return gradients

    def _sequences(self, q, k, v, lengths, causal, scale):
        assert lengths.query_ends.dtype == lengths.key_ends.dtype == torch.int32
        ends = zip(lengths.query_ends.tolist(), lengths.key_ends.tolist(), strict=True)
        for (q0, k0), (q1, k1) in itertools.pairwise(ends):
            assert 0 < q1 - q0 <= lengths.longest_query and 0 < k1 - k0 <= lengths.longest_key
            q_HSD = q[q0:q1].transpose(0, 1)
            k_HSD, v_HSD = (t[k0:k1].transpose(0, 1).repeat_interleave(q.shape[1] // t.shape[1], 0) for t in (k, v))
            scores = q_HSD @ k_HSD.transpose(1, 2) * scale
            if causal:
                scores = scores.masked_fill(~torch.ones_like(scores[0], dtype=torch.bool).tril(), -torch.inf)
            yield slice(q0, q1), slice(k0, k1), (q_HSD, k_HSD, v_HSD), scores


@pytest.fixture(params=["cascade", "one variable-length call", "two parts merged"])
def kernel(request, monkeypatch):
    """All ways to compute a row: the second and third as with CUDA, but for the kernel itself."""
    if request.param == "one variable-length call":
        monkeypatch.setattr(attention, "find_kernel", lambda q: one_by_one)
    if request.param == "two parts merged":
        monkeypatch.setattr(attention, "find_merging", lambda q, k: SlowKernel())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_equal_the_dense_mask(name, kv_heads, kernel):
    layout = LAYOUTS[name]
    mask = visible(layout)
    inputs = draw(len(mask), kv_heads)
    weight = torch.randn(H, len(mask), D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for scale in (None, 0.7):
        ours = packed_attention(*inputs, torch.tensor(layout, dtype=torch.int32), scale)
        theirs = dense(*inputs, mask, scale or D**-0.5)
        # float64: sums of tens of numbers of order one, in another order.
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
        for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_gradients_of_a_rows_parts_are_put_together_at_once():
    """Not added one by one, each as large as the row."""
    counts = []
    for blocks in (2, 9):
        layout = torch.tensor([[3, 2, 4, 1]] * blocks)
        positions = int(layout.sum())
        inputs = draw(positions, 2)
        out = packed_attention(*inputs, layout)
        with Operations() as operations:
            torch.autograd.grad(out.sum(), inputs)
        counts.append(sum(positions in shape for shape in operations.shapes))
    assert counts[0] == counts[1]


def test_other_masks_differ(kernel):
    """The comparison can fail: a causal row, prefixes without segments or segments without a prefix are far off."""
    layout = LAYOUTS["blocks and padding"]
    inputs = draw(sum(map(sum, layout)), 2)
    ours = packed_attention(*inputs, torch.tensor(layout))
    whole_blocks = [[sum(lengths)] for lengths in layout]
    no_prefix = [[0, *filter(None, lengths)] for lengths in layout]
    for wrong in ([[len(ours[0])]], whole_blocks, no_prefix):
        assert (ours - dense(*inputs, visible(wrong))).abs().max() > 0.5


def test_rows_without_a_prefix_make_no_mask():
    """It would be as large as a row squared, of every length of rows."""
    attention._segment_mask.cache_clear()
    inputs = draw(12, 2)
    packed_attention(*inputs, torch.tensor([[0, 5, 7]]))
    assert attention._segment_mask.cache_info().currsize == 0
    packed_attention(*inputs, torch.tensor([[2, 4, 6]]))
    assert attention._segment_mask.cache_info().currsize == 1


def test_merging_is_held_to_float64_where_it_is_used():
    """In single precision; and parts that are merged by their sizes, say, are not taken."""

    class Unmerged(SlowKernel):
        def forward(self, *arguments):
            out, lse = super().forward(*arguments)
            return out, torch.zeros_like(lse)

    values, gradients = largest_gaps(SlowKernel(), torch.device("cpu"), torch.float32)
    assert values < 2e-6 and gradients < 2e-5  # fp32, sums of tens
    values, gradients = largest_gaps(Unmerged(), torch.device("cpu"), torch.float32)
    assert values > 0.1 and gradients > 0.3


class Undefined(SlowKernel):
    """Gives no gradient of the keys that is a number."""

    def backward(self, *arguments):
        d_q, d_k, d_v = super().backward(*arguments)
        return d_q, d_k * torch.nan, d_v


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_merging_is_tried_both_ways_at_its_first_use_which_is_in_sampling(mode, monkeypatch):
    """Where it would not be used, nor in training after that, if it could not be tried without gradients."""
    case = torch.device("cpu"), torch.float32, 2, 32
    prefix_attention.usable.cache_clear()
    monkeypatch.setattr(prefix_attention, "FlashKernel", SlowKernel)
    with mode():
        assert prefix_attention.usable(*case)
    prefix_attention.usable.cache_clear()
    monkeypatch.setattr(prefix_attention, "FlashKernel", Undefined)
    with mode(), pytest.warns(UserWarning, match="two parts merged are .*nan"):
        assert not prefix_attention.usable(*case)
    prefix_attention.usable.cache_clear()


def test_merging_gives_the_kernel_no_copies_of_a_prefix():
    """Its keys are as many as the row's positions, and once more the prefixes."""
    seen = []

    class Counting(SlowKernel):
        def forward(self, q, k, *arguments):
            seen.append((len(q), len(k)))
            return super().forward(q, k, *arguments)

    q, k, v = draw(40 + 8 * 5, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "find_merging", lambda q, k: Counting())
        packed_attention(q, k, v, torch.tensor([[40, *[5] * 8]]))
    assert seen == [(80, 80), (40, 40)]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["find_merging", "find_kernel"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_cuda_kernels_equal_the_dense_mask(kv_heads, way, monkeypatch):
    layout = LAYOUTS["blocks and padding"]
    mask = visible(layout)
    exact = draw(len(mask), kv_heads)
    fed = [tensor.detach().to(DEVICE).bfloat16().requires_grad_() for tensor in exact]
    found = getattr(attention, way)(*fed[: 2 if way == "find_merging" else 1])
    assert (found is not None) == ON_CARD
    if way == "find_kernel":  # which is taken where the other is not to be had
        monkeypatch.setattr(attention, "find_merging", lambda q, k: None)
    ours, theirs = packed_attention(*fed, torch.tensor(layout)), dense(*exact, mask)
    # bfloat16 keeps 8 bits; sums of tens of numbers of order one.
    torch.testing.assert_close(ours.double().cpu(), theirs, atol=3e-2, rtol=0)
    for a, b in zip(*(torch.autograd.grad(out.sum(), x) for out, x in ((ours, fed), (theirs, exact))), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, atol=1e-1, rtol=0)
