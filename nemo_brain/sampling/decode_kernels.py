"""A Triton kernel for the attention of sampling: one query of every row, against its prompt's keys and its own.

Neither masks nor copies: how much of the caches is there is read from the card, so that a recorded graph goes on being
right when rows grow, end and come. Never run on a card: tests interpret it, and compile it for cards.

Shapes: R rows, G groups, P prompt positions, T output positions, H query heads and K key-value heads of this
tensor-parallel rank, M = H / K, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemo_brain.core import first_use

# Positions whose keys are looked at together: fp32 products take several times the shared memory.
_BLOCKS = {torch.float32: 32}
_BLOCK = 64


def attend(
    q_RHD: torch.Tensor,
    k_RKD: torch.Tensor,
    v_RKD: torch.Tensor,
    prompt: list[torch.Tensor],
    output: list[torch.Tensor],
    held_3R: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The rows' attention [R, H, D]. Their new keys and values go into ``output``.

    Args:
        prompt: keys and values of prompts, at least [G, K, P, D]; contiguous.
        output: of the rows' own positions, at least [R, K, T, D]; contiguous.
        held_3R: int64; each row's place in ``prompt``, how many positions of that it sees, and how many of its own,
            beside the new one, whose place is behind these.
    """
    rows, heads, width = q_RHD.shape
    kv_heads = k_RKD.shape[1]
    q_RHD, k_RKD, v_RKD = (tensor.contiguous() for tensor in (q_RHD, k_RKD, v_RKD))
    out_RHD = torch.empty_like(q_RHD)
    _attend[(rows, kv_heads)](
        q_RHD,
        k_RKD,
        v_RKD,
        *prompt,
        *output,
        out_RHD,
        *held_3R,
        prompt[0].shape[2],
        output[0].shape[2],
        scale,
        KV_HEADS=kv_heads,
        PER_KV=heads // kv_heads,
        WIDTH=width,
        QUERIES=max(16, triton.next_power_of_2(heads // kv_heads)),  # what tensor cores take at least
        COLUMNS=triton.next_power_of_2(width),
        BLOCK=_BLOCKS.get(q_RHD.dtype, _BLOCK),
        PRECISION="ieee" if q_RHD.dtype == torch.float32 else "tf32",
    )
    return out_RHD


def problem(device: torch.device, dtype: torch.dtype, per_kv: int, width: int) -> str | None:
    """How far it is from float64 there, if that is more than rounding; None: it is right.

    Args:
        per_kv, width: queries of a key-value head, and the width of a head.
    """
    gap = largest_gap(device, dtype, per_kv, width)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # of values of size one: rounding to the dtype, twice
    return None if gap <= bound else f"Triton's kernel is {gap:.2g} away from float64"


def largest_gap(device: torch.device, dtype: torch.dtype, per_kv: int = 2, width: int = 32) -> float:
    """Between the kernel's attention and float64's, of random rows of several lengths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, groups, heads, kv_heads = 5, 2, 2 * per_kv, 2
    q_RHD, k_RKD, v_RKD = random(rows, heads, width), random(rows, kv_heads, width), random(rows, kv_heads, width)
    prompt = [random(groups, kv_heads, 130, width) for _ in range(2)]
    output = [random(rows, kv_heads, 70, width) for _ in range(2)]
    held = [[0, 0, 1, 1, 0], [130, 130, 1, 1, 0], [0, 69, 3, 64, 0]]
    pairs, scale = [], width**-0.5
    out_RHD = attend(q_RHD, k_RKD, v_RKD, prompt, output, torch.tensor(held, device=device), scale).double()
    for r, (group, p, t) in enumerate(zip(*held, strict=True)):
        keys, values = (
            torch.cat([prompt[i][group, :, :p], output[i][r, :, : t + 1]], dim=1).double() for i in range(2)
        )
        q_KMD = q_RHD[r].double().view(kv_heads, per_kv, width)
        exact = (q_KMD @ keys.transpose(1, 2) * scale).softmax(-1) @ values
        pairs.append((out_RHD[r], exact.view(heads, width)))
    return first_use.largest_gap(pairs)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    q_MD, keys, values, peak_M, total_M, out_MD, start, length, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the positions from ``start`` on, so far as they are below ``length``, into the running softmax."""
    position_N = start + tl.arange(0, BLOCK)
    column_D = tl.arange(0, COLUMNS)
    place_ND = position_N[:, None] * WIDTH + column_D[None, :]
    there = (position_N[:, None] < length) & (column_D[None, :] < WIDTH)
    key_ND = tl.load(keys + place_ND, mask=there, other=0.0)
    score_MN = tl.dot(q_MD, tl.trans(key_ND), input_precision=PRECISION) * scale
    score_MN = tl.where((position_N < length)[None, :], score_MN, float("-inf"))
    highest_M = tl.maximum(peak_M, tl.max(score_MN, axis=1))
    weight_MN = tl.exp(score_MN - highest_M[:, None])
    fade_M = tl.exp(peak_M - highest_M)
    value_ND = tl.load(values + place_ND, mask=there, other=0.0)
    out_MD = out_MD * fade_M[:, None] + tl.dot(weight_MN.to(value_ND.dtype), value_ND, input_precision=PRECISION)
    return highest_M, total_M * fade_M + tl.sum(weight_MN, axis=1), out_MD


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, prompt_keys, prompt_values, keys, values, out, group, prompt_length, length,
    prompt_size, output_size, scale,
    KV_HEADS: tl.constexpr, PER_KV: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own, seen = tl.load(length + row), tl.load(prompt_length + row)
    column_D, query_M = tl.arange(0, COLUMNS), tl.arange(0, QUERIES)
    within_D = column_D < WIDTH
    place_MD = (row * KV_HEADS * PER_KV + head * PER_KV + query_M[:, None]) * WIDTH + column_D[None, :]
    asked_MD = (query_M[:, None] < PER_KV) & within_D[None, :]
    q_MD = tl.load(q + place_MD, mask=asked_MD, other=0.0)

    # The new position, which goes into the cache too.
    new_D = (row * KV_HEADS + head) * WIDTH + column_D
    key_D, value_D = tl.load(k + new_D, mask=within_D, other=0.0), tl.load(v + new_D, mask=within_D, other=0.0)
    own_keys = keys + (row * KV_HEADS + head) * output_size * WIDTH
    own_values = values + (row * KV_HEADS + head) * output_size * WIDTH
    tl.store(own_keys + own * WIDTH + column_D, key_D, mask=within_D)
    tl.store(own_values + own * WIDTH + column_D, value_D, mask=within_D)
    peak_M = tl.sum(q_MD.to(tl.float32) * key_D[None, :].to(tl.float32), axis=1) * scale
    total_M = tl.full([QUERIES], 1.0, tl.float32)
    out_MD = tl.zeros([QUERIES, COLUMNS], tl.float32) + value_D[None, :].to(tl.float32)

    place = tl.load(group + row)
    shared_keys = prompt_keys + (place * KV_HEADS + head) * prompt_size * WIDTH
    shared_values = prompt_values + (place * KV_HEADS + head) * prompt_size * WIDTH
    for start in range(0, seen, BLOCK):
        peak_M, total_M, out_MD = _block(
            q_MD, shared_keys, shared_values, peak_M, total_M, out_MD, start, seen, scale,
            WIDTH, COLUMNS, BLOCK, PRECISION,
        )  # fmt: skip
    for start in range(0, own, BLOCK):
        peak_M, total_M, out_MD = _block(
            q_MD, own_keys, own_values, peak_M, total_M, out_MD, start, own, scale, WIDTH, COLUMNS, BLOCK, PRECISION
        )
    tl.store(out + place_MD, (out_MD / total_M[:, None]).to(q_MD.dtype), mask=asked_MD)
