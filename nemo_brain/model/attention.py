"""Attention over packed rows of groups.

Shapes: S positions of a row, P of a prefix, N outputs of a group, H query heads and K key-value heads of this
tensor-parallel rank, D head width.

``GroupAttention`` is the core attention of every layer. What a row looks like reaches it through Megatron's
``attention_mask`` argument: the row's ``layout`` tensor in training and scoring (see groups.py; a tensor, so that it
travels with the micro-batch through pipeline stages and activation recompute), a ``kv_cache.KVCache`` in sampling.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from nemo_brain.host.send import sent
from nemo_brain.model.prefix_attention import find_merging, parts_of, prefix_attention
from nemo_brain.model.varlen import find_kernel, sequences, varlen_attention


class GroupAttention(MegatronModule):
    """Core attention for Megatron layer specs, exact for every layout and without an S x S mask.

    Of the config it reads nothing: ``fields`` refuses other kinds of attention.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: Any = None,
        attention_dropout: Any = None,
        softmax_scale: float | None = None,
        cp_comm_type: Any = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [S, 1, H, D], key and value [S, 1, K, D] -> [S, 1, H * D]; attention_mask: layout tensor or KVCache."""
        positions, _, heads, width = query.shape
        # No selection: its gradient would be another tensor, filled with zeros first.
        q_HSD, k_KSD, v_KSD = (tensor.squeeze(1).transpose(0, 1) for tensor in (query, key, value))
        if isinstance(attention_mask, torch.Tensor):
            out_HSD = packed_attention(q_HSD, k_KSD, v_KSD, attention_mask, self.scale)
        else:
            out_HSD = attention_mask.attend(self.layer_number, q_HSD, k_KSD, v_KSD, self.scale)
        return out_HSD.transpose(0, 1).reshape(positions, 1, heads * width)


def packed_attention(
    q_HSD: torch.Tensor, k_KSD: torch.Tensor, v_KSD: torch.Tensor, layout: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention of a packed row: each block's prefix is causal, each segment sees the prefix and itself. [H, S, D]."""
    blocks = _blocks(tuple(map(tuple, layout.tolist())))
    if (merging := find_merging(q_HSD, k_KSD)) is not None:
        return prefix_attention(q_HSD, k_KSD, v_KSD, parts_of(blocks, q_HSD.device), scale, merging)
    if (kernel := find_kernel(q_HSD)) is not None:
        return varlen_attention(q_HSD, k_KSD, v_KSD, sequences(blocks, q_HSD.device), scale, kernel)
    return _cascade(q_HSD, k_KSD, v_KSD, blocks, scale)


def _cascade(
    q_HSD: torch.Tensor, k_KSD: torch.Tensor, v_KSD: torch.Tensor, blocks: Any, scale: float | None
) -> torch.Tensor:
    """Block by block: one call for the prefix, one in which the segments are a batch."""
    grouped = q_HSD.shape[0] != k_KSD.shape[0]
    sdpa: Any = functools.partial(scaled_dot_product_attention, scale=scale, enable_gqa=grouped)
    outs = []
    # Split at once, so that the parts' gradients are put together at once: those of slices would be added one by one.
    sizes = [size for _, prefix, segments in blocks for size in (prefix, sum(segments))]
    parts = zip(*(tensor.split(sizes, dim=1) for tensor in (q_HSD, k_KSD, v_KSD)), strict=True)
    for _, prefix, segments in blocks:
        (q_HPD, k_KPD, v_KPD), own = next(parts), next(parts)
        if prefix:
            # Queries, keys and values of the prefix: lower-right and upper-left causality coincide.
            outs.append(sdpa(q_HPD[None], k_KPD[None], v_KPD[None], is_causal=True)[0])
        if not segments:
            continue
        # The segments become a batch: [N, heads, longest, D], shorter ones padded with a repeat of any valid position,
        # whose result is dropped and whose keys the causal mask hides from the valid ones.
        gather, scatter = _segment_plan(segments, q_HSD.device)
        q_N, k_N, v_N = (_batch(tensor, gather, segments) for tensor in own)
        if prefix:
            shape = (len(segments), -1, -1, -1)
            k_N = torch.cat([k_KPD[None].expand(shape), k_N], dim=2)
            v_N = torch.cat([v_KPD[None].expand(shape), v_N], dim=2)
            out = sdpa(q_N, k_N, v_N, attn_mask=_segment_mask(max(segments), prefix, q_HSD.device))
        else:
            out = sdpa(q_N, k_N, v_N, is_causal=True)
        out = out.transpose(0, 1).flatten(1, 2)
        outs.append(out if scatter is None else out.index_select(1, scatter))
    return torch.cat(outs, dim=1)


def _batch(tensor_HSD: torch.Tensor, gather: torch.Tensor | None, segments: tuple[int, ...]) -> torch.Tensor:
    """Segments lying one after another, [heads, sum, D] -> [N, heads, longest, D]."""
    heads, _, width = tensor_HSD.shape
    if gather is not None:
        tensor_HSD = tensor_HSD.index_select(1, gather)
    return tensor_HSD.reshape(heads, len(segments), -1, width).transpose(0, 1)


@functools.lru_cache(maxsize=64)
def _blocks(layout: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """(start, prefix length, segment lengths) of each block of the row."""
    blocks = []
    start = 0
    for prefix, *segments in layout:
        present = tuple(length for length in segments if length)
        blocks.append((start, prefix, present))
        start += prefix + sum(present)
    return tuple(blocks)


@functools.lru_cache(maxsize=1024)
def _segment_plan(segments: tuple[int, ...], device: torch.device) -> Any:
    """Index that pads the segments to equal length, and index that undoes it; None, None if they are equal already."""
    longest = max(segments)
    if min(segments) == longest:
        return None, None
    lengths = torch.tensor(segments)
    starts = lengths.cumsum(0) - lengths
    steps = torch.arange(longest)
    gather = (starts[:, None] + steps).clamp(max=int(lengths.sum()) - 1).flatten()
    scatter = torch.cat([index * longest + steps[:length] for index, length in enumerate(segments)])
    return sent(gather, device), sent(scatter, device)


# As many as the layers of one micro-batch use by turns, each a byte for every pair of positions.
@functools.lru_cache(maxsize=32)
def _segment_mask(longest: int, prefix: int, device: torch.device) -> torch.Tensor:
    """[longest, prefix + longest]: position i of a segment sees the prefix and the segment up to i."""
    return torch.ones(longest, prefix + longest, dtype=torch.bool, device=device).tril(prefix)
