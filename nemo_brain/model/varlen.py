"""Attention of a packed row as one variable-length flash-attention call, where CUDA and a kernel for it are there.

Shapes: S positions of a row, H query heads, K key-value heads, D head width, N sequences, M gathered key positions.

Every prefix and every segment of the row is a sequence of its own. A segment's keys are its block's prefix and itself,
so keys and values are gathered by an index; with causality aligned at the lower right corner, query i of a segment sees
the prefix and the segment up to i.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from nemo_brain.core.ranks import is_first_rank
from nemo_brain.host.send import sent

# (q_SHD, k_MKD, v_MKD, sequences, scale) -> out_SHD, causal with lower right alignment
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Sequences", float | None], torch.Tensor]


class Lengths(NamedTuple):
    """Of one variable-length call, in the order in which kernels take it: where its sequences start and end among
    queries and keys, int32 [N + 1], and the longest of each."""

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Lengths:
        """Each sequence's number of queries and of keys."""

        def ends(lengths: Sequence[int]) -> torch.Tensor:
            return sent(torch.tensor([0, *lengths]).cumsum(0).int(), device)

        return cls(ends(queries), ends(keys), max(queries), max(keys))


@dataclass(frozen=True)
class Sequences:
    """The row's sequences. ``keys_M``: which positions of the row are the keys, sequence by sequence."""

    keys_M: torch.Tensor
    lengths: Lengths


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

    return Sequences(sent(torch.tensor(places), device), Lengths.of(queries, keys, device))


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
    """The installed kernel for half-precision CUDA tensors; None where there is none, or for other tensors."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _announced()


@functools.cache
def _announced() -> Kernel | None:
    """What is installed; on the first rank it is said once, and what its lack costs."""
    kernel, said = choose_kernel()
    if is_first_rank():
        if kernel is None:
            warnings.warn(
                f"attention goes block by block, several times slower, for want of a variable-length kernel: {said}",
                stacklevel=2,
            )
        else:
            print(f"attention: {said}", file=sys.stderr)
    return kernel


def choose_kernel() -> tuple[Kernel | None, str]:
    """The first installed kernel that does what ``Kernel`` says, with its name; or None, and why there is none."""
    refused = []
    for name, find in {"flash-attn": _flash_attention, "torch's varlen_attn": _torch_varlen}.items():
        try:
            kernel, version = find()
            return kernel, f"{name} {version}"
        except ImportError as error:
            refused.append(f"{name}: {error}")
    return None, "; ".join(refused)


def _flash_attention() -> tuple[Kernel, str]:
    """ImportError: it is not there, or aligns causality at the upper left corner."""
    import flash_attn

    version = getattr(flash_attn, "__version__", "0")
    if Version(version) < Version("2.1"):
        raise ImportError(f"{version} aligns causality at the upper left corner: 2.1 or later is needed")

    def kernel(
        q_SHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, s: Sequences, scale: float | None
    ) -> torch.Tensor:
        return flash_attn.flash_attn_varlen_func(
            q_SHD,
            k_MKD,
            v_MKD,
            *s.lengths,
            softmax_scale=scale,
            causal=True,
        )

    return kernel, version


def _torch_varlen() -> tuple[Kernel, str]:
    """ImportError: this torch has none that aligns causality at the lower right corner: 2.11 is the first."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        raise ImportError(f"that of torch {torch.__version__} has no window_size: 2.11 or later is needed")
    # Earlier ones share keys and values among query heads without being told.
    told = "enable_gqa" in known

    def kernel(q_SHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, s: Sequences, scale: float | None) -> Any:
        grouped: dict[str, Any] = {"enable_gqa": True} if told and q_SHD.shape[1] != k_MKD.shape[1] else {}
        return varlen_attn(
            q_SHD,
            k_MKD,
            v_MKD,
            *s.lengths,
            scale=scale,
            window_size=(-1, 0),
            **grouped,
        )

    return kernel, str(torch.__version__)
