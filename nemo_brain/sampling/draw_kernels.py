"""Triton kernels for drawing tokens: each column of the logits is read once, and only one block of them again.

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
    rows, columns = logits_RV.shape
    columns_R = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    blocks = ends_RB.shape[1]
    size: Any = triton.next_power_of_2(blocks)
    _find[(rows,)](
        logits_RV,
        peak_R,
        ends_RB,
        local_R,
        columns_R,
        logits_RV.stride(0),
        columns,
        blocks,
        temperature,
        BLOCK=block,
        BLOCKS=size,
    )
    return columns_R


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
    block = tl.minimum(tl.sum((end_B <= local).to(tl.int32), axis=0), blocks - 1)
    end = tl.load(ends + row * blocks + block)
    before = tl.load(ends + row * blocks + block - 1, mask=block > 0, other=0.0)
    column_W = block * BLOCK + tl.arange(0, BLOCK)
    logit_W = tl.load(logits + row * stride + column_W, mask=column_W < columns, other=float("-inf")).to(tl.float32)
    weight_W = tl.exp(tl.div_rn(logit_W, temperature) - peak.to(tl.float32)).to(tl.float64)
    end_W = tl.cumsum(weight_W, axis=0)
    whole = tl.sum(weight_W, axis=0)
    # The block's sum was rounded to float32: the draw is taken as a fraction of it, of what its weights really add to.
    rest = (local - before) / (end - before) * whole
    # Never past the last column that has any weight.
    last = tl.max(tl.where(weight_W > 0.0, tl.arange(0, BLOCK), 0), axis=0)
    within = tl.minimum(tl.sum((end_W <= rest).to(tl.int32), axis=0), last)
    tl.store(found + row, tl.minimum(block * BLOCK + within, columns - 1).to(tl.int64))
