"""Triton kernels between the output layer's products: forward one reads a chunk's logits once, backward one makes their
gradient in one pass, in the dtype in which it is multiplied.

What they compute is ``output_layer``'s own definition, for which torch's operations read or write a chunk some sixteen
times. Never run on a card: tests interpret them, and compile them for cards.

Shapes: T positions, C columns of a chunk, E temperatures.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_brain.core import first_use

_COLUMNS = 4096  # that a program looks at together: 16 KiB of logits
_WARPS = 8


def add_chunk(
    logits_TC: torch.Tensor,
    targets_T: torch.Tensor,
    start: int,
    scale_E: torch.Tensor,
    max_T: torch.Tensor,
    sums_ET: torch.Tensor,
    target_T: torch.Tensor,
) -> None:
    """Adds a chunk's columns to what is known of those before: the last three arguments, in place.

    Args:
        logits_TC: float32; NaN and +inf make a sum NaN, -inf adds nothing to it.
        targets_T, start: int64; the chunk has the targets from ``start`` on.
        scale_E: float32; what logits are multiplied with.
        max_T: the largest logit, -inf at first.
        sums_ET: of exp(scale * (logit - max)); contiguous.
        target_T: the target's logit, 0 where it has not been seen.
    """
    positions, columns = logits_TC.shape
    scales = len(scale_E)
    padded: Any = triton.next_power_of_2(scales)
    _add[(positions,)](
        logits_TC,
        targets_T,
        scale_E,
        max_T,
        sums_ET,
        target_T,
        logits_TC.stride(0),
        positions,
        columns,
        start,
        scales,
        SCALES=padded,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )


def logit_gradient(
    logits_TC: torch.Tensor,
    targets_T: torch.Tensor,
    start: int,
    scale_E: torch.Tensor,
    max_T: torch.Tensor,
    sums_ET: torch.Tensor,
    grad_ET: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """sum over the scales of grad * scale * (1[target] - exp(scale * (logit - max)) / sum), [T, C] in ``dtype``.

    Arguments as in ``add_chunk``, with the maxima and sums of all columns; ``grad_ET`` is that of the log-probs.
    """
    positions, columns = logits_TC.shape
    out_TC = torch.empty(positions, columns, dtype=dtype, device=logits_TC.device)
    _gradient[(positions, triton.cdiv(columns, _COLUMNS))](
        logits_TC,
        targets_T,
        scale_E,
        max_T,
        sums_ET,
        grad_ET.contiguous(),
        out_TC,
        logits_TC.stride(0),
        positions,
        columns,
        start,
        SCALES=len(scale_E),
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    return out_TC


def problem(device: torch.device) -> str | None:
    """How far they are from float64 there, if that is more than rounding; None: they are right."""
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):  # of gradients up to 3
        if not (gap := largest_gap(device, dtype)) <= bound:
            return f"Triton's kernels are {gap:.2g} away from float64 in {dtype}"
    return None


def largest_gap(device: torch.device, dtype: torch.dtype, scales: tuple[float, ...] = (1.0, 0.7, 1.4)) -> float:
    """Between log-probs and gradients by the kernels, from two chunks of columns, and by torch in float64.

    Args:
        dtype: of the gradients.
    """
    generator = torch.Generator().manual_seed(0)
    positions, widths = 5, (_COLUMNS + 77, 300)
    logits = (4 * torch.randn(positions, sum(widths), generator=generator)).to(device)
    targets_T = torch.tensor([0, _COLUMNS + 76, _COLUMNS + 77, sum(widths) - 1, 7], device=device)
    grad_ET = torch.randn(len(scales), positions, generator=generator).clamp(-1, 1).to(device)
    exact = logits.double().requires_grad_()
    exact_ET = torch.stack([(exact * s).log_softmax(-1).gather(-1, targets_T[:, None])[:, 0] for s in scales])
    (exact_grad,) = torch.autograd.grad(exact_ET, exact, grad_ET.double())

    scale_E = torch.tensor(scales, device=device)
    max_T = logits.new_full((positions,), -torch.inf)
    sums_ET, target_T = max_T.new_zeros(len(scales), positions), torch.zeros_like(max_T)
    chunks = list(zip((0, widths[0]), logits.split(widths, dim=1), strict=True))
    for start, logits_TC in chunks:
        add_chunk(logits_TC, targets_T, start, scale_E, max_T, sums_ET, target_T)
    ours_ET = scale_E[:, None] * (target_T - max_T) - sums_ET.log()
    gradients = [
        logit_gradient(logits_TC, targets_T, start, scale_E, max_T, sums_ET, grad_ET, dtype)
        for start, logits_TC in chunks
    ]
    return first_use.largest_gap([(ours_ET, exact_ET), (torch.cat(gradients, dim=1), exact_grad)])


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    logits,
    targets,
    scales,
    maxima,
    sums,
    target_logits,
    stride,
    positions,
    columns,
    start,
    count,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    row = logits + position * stride
    scale_E = tl.arange(0, SCALES)
    there_E = scale_E < count
    place_E = sums + scale_E.to(tl.int64) * positions + position
    factor_E = tl.load(scales + scale_E, mask=there_E, other=1.0)
    sum_E = tl.load(place_E, mask=there_E, other=0.0)
    largest = tl.load(maxima + position)
    for first in range(0, columns, COLUMNS):
        column_C = first + tl.arange(0, COLUMNS)
        logit_C = tl.load(row + column_C, mask=column_C < columns, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(logit_C, axis=0))
        finite = tl.maximum(higher, -3.4028234663852886e38)  # where all are -inf
        weight_EC = tl.exp(factor_E[:, None] * (logit_C - finite)[None, :])
        sum_E = sum_E * tl.exp(factor_E * (largest - finite)) + tl.sum(weight_EC, axis=1)
        largest = higher
    tl.store(place_E, sum_E, mask=there_E)
    tl.store(maxima + position, largest)
    target = tl.load(targets + position) - start
    here = (target >= 0) & (target < columns)
    logit = tl.load(row + target, mask=here, other=0.0)
    tl.store(target_logits + position, tl.load(target_logits + position) + logit)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    targets,
    scales,
    maxima,
    sums,
    grads,
    out,
    stride,
    positions,
    columns,
    start,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_C = column_C < columns
    shifted_C = tl.load(logits + position * stride + column_C, mask=inside_C, other=float("-inf"))
    shifted_C -= tl.load(maxima + position)
    here_C = column_C == tl.load(targets + position) - start
    total_C = tl.zeros((COLUMNS,), tl.float32)
    for e in tl.static_range(SCALES):
        place = e * positions + position
        scale = tl.load(scales + e)
        grad = tl.load(grads + place) * scale
        share_C = tl.exp(scale * shifted_C) / tl.load(sums + place)
        total_C += grad * (tl.where(here_C, 1.0, 0.0) - share_C)
    tl.store(out + position * columns + column_C, total_C.to(out.dtype.element_ty), mask=inside_C)
