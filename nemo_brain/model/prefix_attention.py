"""Attention of a packed row in two parts that are merged, so that no prefix is copied for its segments.

Shapes: S positions of a row, T those of them that have a prefix to see, P those that are a prefix with segments,
H query heads, K key-value heads, D head width, N sequences.

Every prefix and every segment sees itself, causally: one variable-length call. All segments of a block see its prefix:
another one, in which they are one sequence of queries. Both give log-sums of exponentials (lse), and the two merge into
the softmax over both. In the backward pass each part's probabilities are exp(score - lse) with the merged lse, and the
gradient of its scores needs the merged output alone, so each part's backward kernel gives exactly its share, if it is
handed these in the place of its own.

Never run on a card: tests have slow kernels of the same contract in their place.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch

from nemo_brain.core import first_use
from nemo_brain.core.ranks import is_first_rank
from nemo_brain.host.flash import FlashKernel
from nemo_brain.host.send import sent
from nemo_brain.model.varlen import Lengths


@dataclass(frozen=True)
class Parts:
    """The two calls for a row, and which of its positions are the second one's queries [T] and keys [P]."""

    own: Lengths
    shared: Lengths | None
    queries_T: torch.Tensor
    keys_P: torch.Tensor


@functools.lru_cache(maxsize=64)
def parts_of(blocks: tuple[tuple[int, int, tuple[int, ...]], ...], device: torch.device) -> Parts:
    """Of a row's blocks, each (start, prefix length, segment lengths)."""
    own: list[int] = []
    seeing: list[int] = []
    seen: list[int] = []
    queries: list[int] = []
    keys: list[int] = []
    for start, prefix, segments in blocks:
        own += [length for length in (prefix, *segments) if length]
        if prefix and segments:
            seeing.append(sum(segments))
            seen.append(prefix)
            keys += range(start, start + prefix)
            queries += range(start + prefix, start + prefix + sum(segments))

    queries_T, keys_P = (sent(torch.tensor(places), device) for places in (queries, keys))
    shared = Lengths.of(seeing, seen, device) if seen else None
    return Parts(Lengths.of(own, own, device), shared, queries_T, keys_P)


def prefix_attention(
    q_HSD: torch.Tensor,
    k_KSD: torch.Tensor,
    v_KSD: torch.Tensor,
    parts: Parts,
    scale: float | None,
    kernel: FlashKernel,
) -> torch.Tensor:
    """Attention output [H, S, D] of a packed row."""
    tensors = (tensor.transpose(0, 1).contiguous() for tensor in (q_HSD, k_KSD, v_KSD))
    scale = q_HSD.shape[2] ** -0.5 if scale is None else scale
    return _Merged.apply(*tensors, parts, scale, kernel).transpose(0, 1)


def find_merging(q_HSD: torch.Tensor, k_KSD: torch.Tensor) -> FlashKernel | None:
    """The kernel for half-precision CUDA tensors; None where it does not work, or for other tensors."""
    if not q_HSD.is_cuda or q_HSD.dtype not in (torch.bfloat16, torch.float16):
        return None
    return FlashKernel() if usable(q_HSD.device, q_HSD.dtype, len(q_HSD) // len(k_KSD), q_HSD.shape[2]) else None


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, parts: Parts, scale: float, kernel: FlashKernel) -> torch.Tensor:  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(q, k, v, parts.own, True, scale)
        if parts.shared is not None:
            q_T = q.index_select(0, parts.queries_T)
            k_P, v_P = (tensor.index_select(0, parts.keys_P) for tensor in (k, v))
            there, lse_there = kernel.forward(q_T, k_P, v_P, parts.shared, False, scale)
            lse_here = lse.index_select(1, parts.queries_T)
            merged = torch.logaddexp(lse_here, lse_there)
            shares = [(part - merged).exp().t()[..., None] for part in (lse_here, lse_there)]
            both = out.index_select(0, parts.queries_T) * shares[0] + there * shares[1]  # at least in float32
            out.index_copy_(0, parts.queries_T, both.to(out.dtype))
            lse.index_copy_(1, parts.queries_T, merged)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = parts, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        parts, scale, kernel = ctx.given
        d_out = d_out.contiguous()
        d_q, d_k, d_v = kernel.backward(d_out, q, k, v, out, lse, parts.own, True, scale)
        if parts.shared is not None:
            of_T = (tensor.index_select(0, parts.queries_T) for tensor in (d_out, q, out))
            d_out_T, q_T, out_T = of_T
            k_P, v_P = (tensor.index_select(0, parts.keys_P) for tensor in (k, v))
            lse_T = lse.index_select(1, parts.queries_T)
            shares = kernel.backward(d_out_T, q_T, k_P, v_P, out_T, lse_T, parts.shared, False, scale)
            places = parts.queries_T, parts.keys_P, parts.keys_P
            # Each position once: nothing is added in an order that may change.
            for whole, place, share in zip((d_q, d_k, d_v), places, shares, strict=True):
                whole.index_add_(0, place, share)
        return d_q, d_k, d_v, None, None, None


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, per_kv: int, width: int) -> bool:
    """Whether ``FlashKernel`` runs there and its values and gradients are float64's; a warning where they are not.

    Args:
        per_kv, width: queries of a key-value head, and the width of a head.
    """

    def problem() -> str | None:
        gaps = largest_gaps(FlashKernel(), device, dtype, per_kv, width)
        right = all(gap <= bound for gap, bound in zip(gaps, (3e-2, 1e-1), strict=True))  # half precision, sums of tens
        return None if right else f"two parts merged are {gaps} away from float64"

    if not first_use.works_here(problem, "attention copies prefixes for their segments"):
        return False
    if is_first_rank():
        print(f"attention: two calls of torch {torch.__version__}'s flash attention, merged", file=sys.stderr)
    return True


def largest_gaps(
    kernel: FlashKernel, device: torch.device, dtype: torch.dtype, per_kv: int = 2, width: int = 32
) -> tuple[float, float]:
    """Of values, and of gradients, from one dense mask in float64: a row of two blocks."""
    generator = torch.Generator().manual_seed(0)
    blocks = ((0, 5, (3, 9)), (17, 20, (4, 1, 2)))
    positions, kv_heads = 44, 2
    allowed = torch.zeros(positions, positions, dtype=torch.bool)
    for start, prefix, segments in blocks:
        begin = start + prefix
        allowed[start : begin + sum(segments), start:begin] = True
        for length in segments:
            allowed[begin : begin + length, begin : begin + length] = True
            begin += length
    allowed &= torch.ones_like(allowed).tril()
    shapes = ((kv_heads * per_kv, positions, width), (kv_heads, positions, width), (kv_heads, positions, width))
    exact = [torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in shapes]
    ours = [tensor.detach().to(device, dtype).requires_grad_() for tensor in exact]
    weight = torch.randn(shapes[0], generator=generator).double()
    q, k, v = exact
    scores = q.unflatten(0, (kv_heads, -1)) @ k[:, None].transpose(2, 3) * width**-0.5
    theirs = (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, None]).flatten(0, 1)
    out = prefix_attention(ours[0], ours[1], ours[2], parts_of(blocks, device), None, kernel)
    (theirs * weight).sum().backward()
    (out * weight.to(device, dtype)).sum().backward()
    gradients = [(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
    return first_use.largest_gap([(out, theirs)]), first_use.largest_gap(gradients)
