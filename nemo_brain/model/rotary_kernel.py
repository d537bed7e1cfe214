"""Rotary embeddings as one Triton kernel each way, where neither Transformer Engine nor Apex gives Megatron one.

Megatron's plain function launches 12 kernels and 8 in the backward pass, for queries and again for keys. This one
computes in float32 and rounds once, as theirs do. Never run on a card: tests interpret it, and compile it for cards.

Shapes: S positions, B rows, H heads, D channels of a head, of which the first R are turned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_brain.core import first_use
from nemo_brain.host.options import plain_rotary

_HEADS = 8  # of a program


def apply_rotary(t_SBHD: torch.Tensor, freqs_SR: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Channel i of the first R is turned together with i + R/2, by their angles; the others stay. [S, B, H, D].

    Args:
        freqs_SR: angles in radians, float32 [S, 1, 1, R].

    Raises:
        ValueError: ``interleaved``.
    """
    if interleaved:
        raise ValueError("rotary_interleaved is not fused here: set model.options.apply_rope_fusion=false")
    turned: torch.Tensor = _Rotary.apply(t_SBHD, freqs_SR)
    return turned


def problem(device: torch.device) -> str | None:
    """How far it is from float64 there, both ways, if that is more than rounding; None: it is right."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):  # of values up to 4: rounding once
        if not (gap := largest_gap(device, dtype)) <= bound:
            return f"Triton's kernel is {gap:.2g} away from float64 in {dtype}"
    return None


def largest_gap(
    device: torch.device, dtype: torch.dtype, heads: int = 3, channels: int = 20, turned: int = 12
) -> float:
    """Between the kernel's values and gradients and those of Megatron's plain function in float64, of angles up to the
    hundreds, as of far positions, and queries that are a part of a larger tensor."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 2, heads, 3 * channels, generator=generator).clamp(-4, 4).to(device, dtype)
    grad_SBHD = torch.randn(7, 2, heads, channels, generator=generator).clamp(-4, 4).to(device, dtype)
    freqs_SR = (200 * torch.randn(7, 1, 1, turned // 2, generator=generator)).repeat(1, 1, 1, 2).to(device)
    results = []
    for kind, function in ((dtype, apply_rotary), (torch.float64, plain_rotary)):
        leaf = whole.to(kind, copy=True).requires_grad_()
        turned_SBHD = function(leaf[..., channels : 2 * channels], freqs_SR if kind == dtype else freqs_SR.double())
        turned_SBHD.backward(grad_SBHD.to(kind))
        results.append((turned_SBHD.detach(), leaf.grad))
    return first_use.largest_gap(zip(*results, strict=True))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t_SBHD: torch.Tensor, freqs_SR: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(freqs_SR)
        return _turned(t_SBHD, freqs_SR, back=False)

    @staticmethod
    def backward(ctx: Any, grad_SBHD: torch.Tensor) -> tuple[torch.Tensor, None]:
        (freqs_SR,) = ctx.saved_tensors
        return _turned(grad_SBHD, freqs_SR, back=True), None


def _turned(t_SBHD: torch.Tensor, freqs_SR: torch.Tensor, back: bool) -> torch.Tensor:
    positions, rows, heads, channels = t_SBHD.shape
    turned = freqs_SR.shape[-1]
    out_SBHD = torch.empty(t_SBHD.shape, dtype=t_SBHD.dtype, device=t_SBHD.device)
    width: Any = triton.next_power_of_2(max(turned // 2, channels - turned, 1))
    grid = (positions * rows, triton.cdiv(heads, _HEADS))
    _turn[grid](
        t_SBHD,
        freqs_SR.contiguous(),
        out_SBHD,
        *t_SBHD.stride(),
        rows,
        heads,
        channels,
        turned // 2,
        BACK=back,
        HEADS=_HEADS,
        WIDTH=width,
    )
    return out_SBHD


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    t,
    freqs,
    out,
    stride_s,
    stride_b,
    stride_h,
    stride_d,
    rows,
    heads,
    channels,
    half,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    position, row = place // rows, place % rows
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel_W = tl.arange(0, WIDTH)
    source_HW = t + position * stride_s + row * stride_b + head_H[:, None] * stride_h + channel_W[None, :] * stride_d
    target_HW = out + (place * heads + head_H[:, None]) * channels + channel_W[None, :]
    there_H = head_H[:, None] < heads
    pair_HW = there_H & (channel_W[None, :] < half)
    first_HW = tl.load(source_HW, mask=pair_HW, other=0.0).to(tl.float32)
    second_HW = tl.load(source_HW + half * stride_d, mask=pair_HW, other=0.0).to(tl.float32)
    angle = freqs + position * 2 * half + channel_W
    first_angle_W = tl.load(angle, mask=channel_W < half, other=0.0)
    second_angle_W = tl.load(angle + half, mask=channel_W < half, other=0.0)
    first_cos_W, first_sin_W = tl.cos(first_angle_W)[None, :], tl.sin(first_angle_W)[None, :]
    second_cos_W, second_sin_W = tl.cos(second_angle_W)[None, :], tl.sin(second_angle_W)[None, :]
    if BACK:
        new_first_HW = first_HW * first_cos_W + second_HW * second_sin_W
        new_second_HW = second_HW * second_cos_W - first_HW * first_sin_W
    else:
        new_first_HW = first_HW * first_cos_W - second_HW * first_sin_W
        new_second_HW = second_HW * second_cos_W + first_HW * second_sin_W
    tl.store(target_HW, new_first_HW.to(out.dtype.element_ty), mask=pair_HW)
    tl.store(target_HW + half, new_second_HW.to(out.dtype.element_ty), mask=pair_HW)
    rest_HW = there_H & (2 * half + channel_W[None, :] < channels)
    kept_HW = tl.load(source_HW + 2 * half * stride_d, mask=rest_HW, other=0.0)
    tl.store(target_HW + 2 * half, kept_HW, mask=rest_HW)
