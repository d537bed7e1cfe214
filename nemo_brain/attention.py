"""Attention over packed rows of groups, and over the key-value cache while sampling.

Shapes: S positions of a row, R rows (outputs) being sampled, G groups, N outputs of a group, P prompt positions, T
output positions, H query heads and K key-value heads of this tensor-parallel rank, D head width.

``GroupAttention`` is the core attention of every layer. What a row looks like reaches it through Megatron's
``attention_mask`` argument: the row's ``layout`` tensor in training and scoring (see groups.py; a tensor, so that it
travels with the micro-batch through pipeline stages and activation recompute), a ``KVCache`` in sampling.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from nemo_brain.varlen import find_kernel, sequences, varlen_attention


class GroupAttention(MegatronModule):
    """Core attention for Megatron layer specs, exact for every layout and without an S x S mask.

    Raises:
        ValueError: for attention features that packed groups do not support.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type=None,
        attention_type=None,
        attention_dropout=None,
        softmax_scale: float | None = None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("model.context_parallel_size must be 1: packed groups do not support context parallelism")
        if config.window_size is not None:
            raise ValueError("model.gpt.window_size is not supported with packed groups")
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [S, 1, H, D], key and value [S, 1, K, D] -> [S, 1, H * D]; attention_mask: layout tensor or KVCache."""
        positions, _, heads, width = query.shape
        q_HSD, k_KSD, v_KSD = (tensor[:, 0].transpose(0, 1) for tensor in (query, key, value))
        if isinstance(attention_mask, KVCache):
            out_HSD = attention_mask.attend(self.layer_number, q_HSD, k_KSD, v_KSD, self.scale)
        else:
            out_HSD = packed_attention(q_HSD, k_KSD, v_KSD, attention_mask, self.scale)
        return out_HSD.transpose(0, 1).reshape(positions, 1, heads * width)


def packed_attention(q_HSD, k_KSD, v_KSD, layout: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Attention of a packed row: each block's prefix is causal, each segment sees the prefix and itself. [H, S, D]."""
    blocks = _blocks(tuple(map(tuple, layout.tolist())))
    if (kernel := find_kernel(q_HSD)) is not None:
        return varlen_attention(q_HSD, k_KSD, v_KSD, sequences(blocks, q_HSD.device), scale, kernel)
    return _cascade(q_HSD, k_KSD, v_KSD, blocks, scale)


def _cascade(q_HSD, k_KSD, v_KSD, blocks, scale: float | None) -> torch.Tensor:
    """Block by block: one call for the prefix, one in which the segments are a batch."""
    sdpa = functools.partial(scaled_dot_product_attention, scale=scale, enable_gqa=q_HSD.shape[0] != k_KSD.shape[0])
    outs = []
    for start, prefix, segments in blocks:
        middle, end = start + prefix, start + prefix + sum(segments)
        if prefix:
            # Queries, keys and values of the prefix: lower-right and upper-left causality coincide.
            outs.append(sdpa(*(tensor[None, :, start:middle] for tensor in (q_HSD, k_KSD, v_KSD)), is_causal=True)[0])
        if not segments:
            continue
        # The segments become a batch: [N, heads, longest, D], shorter ones padded with a repeat of any valid position,
        # whose result is dropped and whose keys the causal mask hides from the valid ones.
        gather, scatter, mask = _segment_plan(segments, prefix, q_HSD.device)
        q_N, k_N, v_N = (_batch(tensor[:, middle:end], gather, segments) for tensor in (q_HSD, k_KSD, v_KSD))
        if prefix:
            shape = (len(segments), -1, -1, -1)
            k_N = torch.cat([k_KSD[None, :, start:middle].expand(shape), k_N], dim=2)
            v_N = torch.cat([v_KSD[None, :, start:middle].expand(shape), v_N], dim=2)
            out = sdpa(q_N, k_N, v_N, attn_mask=mask)
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
def _segment_plan(segments: tuple[int, ...], prefix: int, device: torch.device):
    """Index that pads the segments to equal length, index that undoes it (None, None if equal already), and the mask
    [longest, prefix + longest] by which position i of a segment sees the prefix and the segment up to i."""
    longest = max(segments)
    mask = torch.ones(longest, prefix + longest, dtype=torch.bool, device=device).tril(prefix)
    if min(segments) == longest:
        return None, None, mask
    lengths = torch.tensor(segments)
    starts = lengths.cumsum(0) - lengths
    steps = torch.arange(longest)
    gather = (starts[:, None] + steps).clamp(max=int(lengths.sum()) - 1).flatten()
    scatter = torch.cat([index * longest + steps[:length] for index, length in enumerate(segments)])
    return gather.to(device), scatter.to(device), mask


class KVCache:
    """Keys and values of the prompts (once per group) and of the outputs (once per row) of all layers of this rank.

    Feed it first the prompts as one packed row, then one token per row and call. All rows are at the same output
    position.

    Args:
        prompt_lengths: of the G groups.
        outputs: N, outputs per group; row g * N + i is output i of group g.
    """

    _BLOCK = 64  # output positions by which the buffers grow

    def __init__(self, prompt_lengths: list[int], outputs: int, device: torch.device):
        self.prompt_lengths = prompt_lengths
        self.group_of_row = torch.arange(len(prompt_lengths), device=device).repeat_interleave(outputs)
        self.length = -1  # output positions held; -1 before the prompts are in
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._output: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._plan_rows()

    def _plan_rows(self) -> None:
        """Rows of a group are neighbours; a query's place among its group's: [G, slots] with the rest left empty."""
        groups = len(self.prompt_lengths)
        counts = torch.bincount(self.group_of_row, minlength=groups)
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(self.group_of_row), device=self.group_of_row.device) - first[self.group_of_row]
        self._slots = max(1, int(counts.max()))
        self._slot_of_row = self.group_of_row * self._slots + rank
        lengths = torch.tensor(self.prompt_lengths, device=self.group_of_row.device)
        self._absent_GP = torch.arange(max(self.prompt_lengths), device=lengths.device) >= lengths[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps only these rows (ascending indices), and only the groups that still have one."""
        groups, self.group_of_row = self.group_of_row[rows].unique_consecutive(return_inverse=True)
        if len(groups) < len(self.prompt_lengths):
            self.prompt_lengths = [self.prompt_lengths[g] for g in groups.tolist()]
            longest = max(self.prompt_lengths)
            self._prompt = {
                layer: tuple(tensor[groups, :, :longest] for tensor in pair) for layer, pair in self._prompt.items()
            }
        self._output = {layer: tuple(tensor[rows] for tensor in pair) for layer, pair in self._output.items()}
        self._plan_rows()

    def advance(self) -> None:
        """Call after each complete forward: the tokens fed are now part of every layer's cache."""
        self.length += 1

    def attend(self, layer: int, q_HSD, k_KSD, v_KSD, scale: float | None) -> torch.Tensor:
        """Adds this call's keys and values to the layer's cache; attention output [H, S, D].

        S is the packed prompts at first, one position per row later; positions beyond those (padding for sequence
        parallelism) give zeros.
        """
        if self.length < 0:
            return self._prefill(layer, q_HSD, k_KSD, v_KSD, scale)
        rows = len(self.group_of_row)
        out_RHD = self._decode(layer, *(t[:, :rows].transpose(0, 1) for t in (q_HSD, k_KSD, v_KSD)), scale)
        padding = q_HSD.shape[1] - rows
        if padding:
            out_RHD = torch.cat([out_RHD, out_RHD.new_zeros(padding, *out_RHD.shape[1:])])
        return out_RHD.transpose(0, 1)

    def _prefill(self, layer, q_HSD, k_KSD, v_KSD, scale):
        used = sum(self.prompt_lengths)
        padding = q_HSD.shape[1] - used
        layout = torch.tensor([[length] for length in self.prompt_lengths] + ([[padding]] if padding else []))
        out = packed_attention(q_HSD, k_KSD, v_KSD, layout, scale)
        self._prompt[layer] = tuple(
            torch.nn.utils.rnn.pad_sequence(
                tensor[:, :used].transpose(0, 1).split(self.prompt_lengths), batch_first=True
            ).transpose(1, 2)
            for tensor in (k_KSD, v_KSD)
        )
        return out

    def _decode(self, layer, q_RHD, k_RKD, v_RKD, scale):
        keys_RKTD, values_RKTD = self._append(layer, k_RKD, v_RKD)
        prompt_keys_GKPD, prompt_values_GKPD = self._prompt[layer]
        rows, heads, width = q_RHD.shape
        kv_heads = k_RKD.shape[1]
        per_kv = heads // kv_heads
        scale = width**-0.5 if scale is None else scale
        q_RKMD = q_RHD.reshape(rows, kv_heads, per_kv, width) * scale
        # All queries of a group meet its prompt's keys in one product: the prompt's cache is read once per group.
        scores_prompt = self._to_rows(self._to_groups(q_RKMD) @ prompt_keys_GKPD.transpose(2, 3), per_kv)
        scores_prompt = scores_prompt.masked_fill(self._absent_GP[self.group_of_row][:, None, None], float("-inf"))
        scores_own = q_RKMD @ keys_RKTD.transpose(2, 3)
        weights = torch.cat([scores_prompt, scores_own], dim=-1).float().softmax(dim=-1).to(q_RHD.dtype)
        weights_prompt, weights_own = weights.split([scores_prompt.shape[-1], scores_own.shape[-1]], dim=-1)
        out = self._to_rows(self._to_groups(weights_prompt) @ prompt_values_GKPD, per_kv) + weights_own @ values_RKTD
        return out.reshape(rows, heads, width)

    def _append(self, layer, k_RKD, v_RKD):
        rows, kv_heads, width = k_RKD.shape
        pair = self._output.get(layer)
        if pair is None or pair[0].shape[2] == self.length:
            grown = [k_RKD.new_zeros(rows, kv_heads, self.length + self._BLOCK, width) for _ in range(2)]
            for new, old in zip(grown, pair or (), strict=False):
                new[:, :, : self.length] = old
            pair = self._output[layer] = tuple(grown)
        for buffer, new in zip(pair, (k_RKD, v_RKD), strict=True):
            buffer[:, :, self.length] = new
        return tuple(buffer[:, :, : self.length + 1] for buffer in pair)

    def _to_groups(self, tensor_RKMX: torch.Tensor) -> torch.Tensor:
        """[R, K, M, X] -> [G, K, slots * M, X]; empty slots are zero."""
        groups = len(self.prompt_lengths)
        _, kv_heads, per_kv, last = tensor_RKMX.shape
        slots = tensor_RKMX.new_zeros(groups * self._slots, kv_heads, per_kv, last)
        slots[self._slot_of_row] = tensor_RKMX
        return slots.view(groups, self._slots, kv_heads, per_kv, last).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, tensor_GKYX: torch.Tensor, per_kv: int) -> torch.Tensor:
        """The inverse of ``_to_groups``."""
        groups, kv_heads, _, last = tensor_GKYX.shape
        slots = tensor_GKYX.view(groups, kv_heads, self._slots, per_kv, last).transpose(1, 2)
        return slots.reshape(groups * self._slots, kv_heads, per_kv, last)[self._slot_of_row]
