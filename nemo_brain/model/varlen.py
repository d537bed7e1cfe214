"""Attention of a packed row as one variable-length flash-attention call, where CUDA and a kernel for it are there.

Shapes: S positions of a row, H query heads, K key-value heads, D head width, N sequences, M gathered key positions.

Every prefix and every segment of the row is a sequence of its own. A segment's keys are its block's prefix and itself,
so keys and values are gathered by an index; with causality aligned at the lower right corner, query i of a segment sees
the prefix and the segment up to i.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# (q_SHD, k_MKD, v_MKD, sequences, scale) -> out_SHD, causal with lower right alignment
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Sequences", float | None], torch.Tensor]


@dataclass(frozen=True)
class Sequences:
    """The row's sequences. ``keys_M``: which positions of the row are the keys, sequence by sequence; ``query_ends``,
    ``key_ends``: int32 [N + 1], where sequences start and end among queries and keys; the longest of each."""

    keys_M: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int


@functools.lru_cache(maxsize=64)
def sequences(blocks: tuple[tuple[int, int, tuple[int, ...]], ...], device: torch.device) -> Sequences:
    """Of a row's blocks, each (start, prefix length, segment lengths)."""
    queries: list = []
    keys: list = []
    places: list = []
    for start, prefix, segments in blocks:
        shared = range(start, start + prefix)
        if prefix:
            queries.append(prefix)
            keys.append(prefix)
            places += shared
        begin = start + prefix
        for length in segments:
            queries.append(length)
            keys.append(prefix + length)
            places += [*shared, *range(begin, begin + length)]
            begin += length

    def ends(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    return Sequences(torch.tensor(places, device=device), ends(queries), ends(keys), max(queries), max(keys))


def varlen_attention(
    q_HSD: torch.Tensor,
    k_KSD: torch.Tensor,
    v_KSD: torch.Tensor,
    sequences: Sequences,
    scale: float | None,
    kernel: Kernel,
) -> torch.Tensor:
    """Attention output [H, S, D] of a packed row by one call of the kernel."""
    q_SHD = q_HSD.transpose(0, 1).contiguous()
    k_MKD, v_MKD = (tensor.transpose(0, 1).index_select(0, sequences.keys_M) for tensor in (k_KSD, v_KSD))
    return kernel(q_SHD, k_MKD, v_MKD, sequences, scale).transpose(0, 1)


def find_kernel(q: torch.Tensor) -> Kernel | None:
    """flash-attn's kernel, else torch's own, for half-precision CUDA tensors; None where neither applies."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _installed()


def installed_kernel() -> str | None:
    """The name of the kernel that half precision on CUDA takes; None: none is installed."""
    kernel: Any = _installed()
    return None if kernel is None else kernel.__name__


@functools.cache
def _installed() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_kernel()

    def flash_attn(
        q_SHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, s: Sequences, scale: float | None
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            q_SHD,
            k_MKD,
            v_MKD,
            s.query_ends,
            s.key_ends,
            s.longest_query,
            s.longest_key,
            softmax_scale=scale,
            causal=True,
        )

    return flash_attn


def _torch_kernel() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        return None  # an earlier interface, without grouped queries

    def torch_varlen_attn(
        q_SHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, s: Sequences, scale: float | None
    ) -> Any:
        return varlen_attn(
            q_SHD,
            k_MKD,
            v_MKD,
            s.query_ends,
            s.key_ends,
            s.longest_query,
            s.longest_key,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=q_SHD.shape[1] != k_MKD.shape[1],
        )

    return torch_varlen_attn
