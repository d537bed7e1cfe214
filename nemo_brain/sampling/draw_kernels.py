"""Triton kernels for drawing tokens: each column of the logits is read once, and only one block of them again.

A rank that has all columns draws by two launches; tensor-parallel ranks exchange their masses in between.

What they compute is ``draws``'s own definition; sums are added in another order, so a draw within rounding of where two
tokens' intervals meet may give the other one. Never run on a card: tests interpret them, and compile them for cards.

Shapes: R rows, V vocabulary columns of this rank, B blocks of W columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_PROGRAM_COLUMNS = 4096  # that one program adds up: 16 KiB of fp32


def draw(
    logits_RV: torch.Tensor, uniforms_R: torch.Tensor, temperature: float, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``draws.draw_tokens`` where this rank has all columns: two launches in all."""
    peaks_RB, sums_RB = block_masses(logits_RV, temperature, block)
    tokens_R = torch.empty_like(uniforms_R, dtype=torch.int64)
    logprobs_R = torch.empty_like(uniforms_R)
    tensors = (uniforms_R, peaks_RB, sums_RB, tokens_R, logprobs_R)
    _for_each_row(_draw, logits_RV, tensors, peaks_RB.shape[1], temperature, block)
    return tokens_R, logprobs_R


def block_masses(logits_RV: torch.Tensor, temperature: float, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block of ``block`` columns the largest logit / temperature, and the sum of exp(logit / temperature - it).

    Both are [R, B] float32. NaN, and +inf, make a sum NaN.
    """
    rows, columns = logits_RV.shape
    blocks = -(-columns // block)
    peaks_RB = torch.empty(rows, blocks, dtype=torch.float32, device=logits_RV.device)
    sums_RB = torch.empty_like(peaks_RB)
    each = max(1, _PROGRAM_COLUMNS // block)
    grid = (rows, -(-blocks // each))
    _masses[grid](
        logits_RV, peaks_RB, sums_RB, logits_RV.stride(0), columns, blocks, temperature, BLOCK=block, BLOCKS=each
    )
    return peaks_RB, sums_RB


def find_columns(
    logits_RV: torch.Tensor,
    peak_R: torch.Tensor,
    temperature: float,
    ends_RB: torch.Tensor,
    local_R: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """The first column of each row whose cumulative weight exceeds ``local_R``, int64 [R].

    Args:
        peak_R: float64; weights are exp(logit / temperature - it).
        ends_RB: their sums up to the end of each block, float64.
        local_R: float64, below the last of them.
    """
    columns_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    _for_each_row(_find, logits_RV, (peak_R, ends_RB, local_R, columns_R), ends_RB.shape[1], temperature, block)
    return columns_R


def _for_each_row(
    kernel: Any, logits_RV: torch.Tensor, tensors: tuple[torch.Tensor, ...], blocks: int, temperature: float, block: int
) -> None:
    """One program for each row, which looks at all of its blocks' masses together."""
    rows, columns = logits_RV.shape
    size: Any = triton.next_power_of_2(blocks)
    kernel[(rows,)](logits_RV, *tensors, logits_RV.stride(0), columns, blocks, temperature, BLOCK=block, BLOCKS=size)


@triton.jit
def _masses(  # type: ignore[no-untyped-def]
    logits, peaks, sums, stride, columns, blocks, temperature, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column_BW = block_B[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column_BW < columns
    logit_BW = tl.load(logits + row * stride + column_BW, mask=inside, other=float("-inf")).to(tl.float32)
    logit_BW = tl.div_rn(logit_BW, temperature)
    peak_B = tl.max(logit_BW, axis=1)
    least_B = tl.maximum(peak_B, -3.4028234663852886e38)  # where all are -inf
    sum_B = tl.sum(tl.exp(logit_BW - least_B[:, None]), axis=1)
    place_B = row * blocks + block_B
    tl.store(peaks + place_B, peak_B, mask=block_B < blocks)
    tl.store(sums + place_B, sum_B, mask=block_B < blocks)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits,
    uniforms,
    peaks,
    sums,
    tokens,
    logprobs,
    stride,
    columns,
    blocks,
    temperature,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index_B = tl.arange(0, BLOCKS)
    peak_B = tl.load(peaks + row * blocks + index_B, mask=index_B < blocks, other=float("-inf")).to(tl.float64)
    sum_B = tl.load(sums + row * blocks + index_B, mask=index_B < blocks, other=0.0).to(tl.float64)
    peak = tl.max(peak_B, axis=0)
    least = tl.maximum(peak, -3.4028234663852886e38)  # where all are -inf
    end_B = tl.cumsum(sum_B * tl.exp(peak_B - least), axis=0)
    total = tl.sum(tl.where(index_B == blocks - 1, end_B, 0.0), axis=0)
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)  # the next smaller number
    local = tl.minimum(tl.load(uniforms + row) * total, below)
    column, logit = _column(logits + row * stride, columns, blocks, temperature, least, end_B, local, BLOCK, BLOCKS)
    law = (local >= 0.0) & (local < total)  # not of NaN, and not where there is no mass
    tl.store(tokens + row, tl.where(law, column, -1))
    tl.store(logprobs + row, tl.where(law, logit.to(tl.float64) - peak - tl.log(total), float("-inf")))


@triton.jit
def _find(  # type: ignore[no-untyped-def]
    logits,
    peaks,
    ends,
    locals_,
    found,
    stride,
    columns,
    blocks,
    temperature,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peak, local = tl.load(peaks + row), tl.load(locals_ + row)
    index_B = tl.arange(0, BLOCKS)
    end_B = tl.load(ends + row * blocks + index_B, mask=index_B < blocks, other=float("inf"))
    column, _ = _column(logits + row * stride, columns, blocks, temperature, peak, end_B, local, BLOCK, BLOCKS)
    tl.store(found + row, column)


@triton.jit
def _column(  # type: ignore[no-untyped-def]
    logits, columns, blocks, temperature, peak, end_B, local, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """The first column of a row whose cumulative weight exceeds ``local``, and its logit / temperature."""
    index_B = tl.arange(0, BLOCKS)
    block = tl.minimum(tl.sum(((end_B <= local) & (index_B < blocks)).to(tl.int32), axis=0), blocks - 1)
    end = tl.sum(tl.where(index_B == block, end_B, 0.0), axis=0)
    before = tl.sum(tl.where(index_B == block - 1, end_B, 0.0), axis=0)
    index_W = tl.arange(0, BLOCK)
    column_W = block * BLOCK + index_W
    logit_W = tl.load(logits + column_W, mask=column_W < columns, other=float("-inf")).to(tl.float32)
    logit_W = tl.div_rn(logit_W, temperature)
    weight_W = tl.exp(logit_W - peak.to(tl.float32)).to(tl.float64)
    end_W = tl.cumsum(weight_W, axis=0)
    whole = tl.sum(weight_W, axis=0)
    # The block's sum was rounded to float32: the draw is taken as a fraction of it, of what its weights really add to.
    rest = (local - before) / (end - before) * whole
    # Never past the last column that has any weight.
    last = tl.max(tl.where(weight_W > 0.0, index_W, 0), axis=0)
    within = tl.minimum(tl.sum((end_W <= rest).to(tl.int32), axis=0), last)
    logit = tl.sum(tl.where(index_W == within, logit_W, 0.0), axis=0)
    return tl.minimum(block * BLOCK + within, columns - 1).to(tl.int64), logit
