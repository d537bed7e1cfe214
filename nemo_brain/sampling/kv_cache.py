"""The key-value cache of sampling: prompts are held once per group, outputs once per row.

Shapes: R rows (outputs in flight), G groups, P prompt positions, T output positions, H query heads and K key-value
heads of this tensor-parallel rank, M = H / K, D head width, S positions of a packed row.

Groups come and rows go at any time: one pass may hold new prompts and one token of every row. Rows and groups lie
without gaps; the place of one that leaves is taken by the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemo_brain.host.send import pinned, sent
from nemo_brain.model.attention import packed_attention

_BLOCK = 64  # positions, rows or groups by which the buffers grow at least; otherwise by half


def vacate(count: int, leaving: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which places of ``count`` become empty and which of the last ones move there: (places, movers), pairwise."""
    left = set(leaving)
    rest = count - len(left)
    return [place for place in sorted(left) if place < rest], [i for i in range(rest, count) if i not in left]


class KVCache:
    """Keys and values of all layers of this rank, for one lane of rows.

    Before each forward pass ``plan`` says what it brings, which the cache counts as its own from then on; it serves as
    every layer's attention mask in that pass, and each layer's buffers follow what is counted. Between passes ``drop``
    takes rows out.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self.prompt_lengths = np.zeros(0, dtype=np.int64)  # [G]
        self.group_of_row = np.zeros(0, dtype=np.int64)  # [R]
        self.length_of_row = np.zeros(0, dtype=np.int64)  # [R] output positions held
        self._prompt: dict[int, list[torch.Tensor]] = {}  # by layer: keys and values, at least [G, K, P, D]
        self._output: dict[int, list[torch.Tensor]] = {}  # by layer: keys and values, at least [R, K, T, D]
        self._pass = _Pass([], (0, 0), (0, 0))
        self.moves = 0  # so often have buffers been replaced by larger ones

    def plan(
        self, prompt_lengths: Sequence[int] = (), outputs: int = 0, steps: int = 1, kept: KeptRows | None = None
    ) -> None:
        """The next pass: these prompts one after another, then one token of every row, then padding if need be.

        Each of the prompts becomes a group with ``outputs`` rows behind the others, which hold nothing yet.

        With ``steps`` above 1 so many passes follow, of one token of every row each and without prompts. They are the
        same operations on the same tensors: the host does nothing between them but call ``advance``. With ``kept`` they
        are also those of the last such plan with it, unless ``moves`` has changed since.
        """
        parts: list[_Prompts | _Rows | KeptRows] = []
        new = np.array(prompt_lengths, dtype=np.int64)
        groups = len(self.prompt_lengths) + np.arange(len(new))
        if len(new):
            parts.append(_Prompts(groups, new, self.device))
        if kept is not None:
            kept.load(self.prompt_lengths, self.group_of_row, self.length_of_row)
            parts.append(kept)
        elif len(self.group_of_row):
            parts.append(_Rows(self.prompt_lengths, self.group_of_row, self.length_of_row, steps, self.device))
        self.prompt_lengths = np.concatenate([self.prompt_lengths, new])
        self.group_of_row = np.concatenate([self.group_of_row, groups.repeat(outputs)])
        self.length_of_row = np.concatenate([self.length_of_row + steps, np.zeros(len(new) * outputs, dtype=np.int64)])
        prompt_size, output_size = (
            (len(lengths), int(lengths.max(initial=0))) for lengths in (self.prompt_lengths, self.length_of_row)
        )
        self._pass = _Pass(parts, prompt_size, output_size)
        if kept is not None:
            self._pass = _Pass(parts, prompt_size, (kept.tokens, output_size[1]))
            for layer, (keys_RKTD, _) in list(self._output.items()):
                self._grown(self._output, layer, *self._pass.output_size, keys_RKTD[0])

    def attend(
        self, layer: int, q_HSD: torch.Tensor, k_KSD: torch.Tensor, v_KSD: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Adds the pass's keys and values to the layer's cache; attention output [H, S, D], zeros for padding."""
        prompt = self._grown(self._prompt, layer, *self._pass.prompt_size, k_KSD)
        output = self._grown(self._output, layer, *self._pass.output_size, k_KSD)
        outs, start = [], 0
        for part in self._pass.parts:
            end = start + part.tokens
            q, k, v = (tensor[:, start:end] for tensor in (q_HSD, k_KSD, v_KSD))
            outs.append(part.attend(prompt, output, q, k, v, scale))
            start = end
        padding = q_HSD.shape[1] - start
        if padding:
            outs.append(q_HSD.new_zeros(len(q_HSD), padding, q_HSD.shape[2]))
        return torch.cat(outs, dim=1)

    def advance(self) -> None:
        """Between two of the passes that ``plan`` has planned together."""
        (rows,) = self._pass.parts
        assert not isinstance(rows, _Prompts)
        rows.advance()

    def drop(self, rows: Sequence[int]) -> None:
        """Takes rows out, and the groups that have none left; others move as ``vacate`` says."""
        places, movers = vacate(len(self.group_of_row), rows)
        self.group_of_row, self.length_of_row = (
            _fill(array, places, movers, len(rows)) for array in (self.group_of_row, self.length_of_row)
        )
        _move(self._output, places, movers)
        present = set(self.group_of_row.tolist())
        gone = [group for group in range(len(self.prompt_lengths)) if group not in present]
        places, movers = vacate(len(self.prompt_lengths), gone)
        self.prompt_lengths = _fill(self.prompt_lengths, places, movers, len(gone))
        for place, mover in zip(places, movers, strict=True):
            self.group_of_row[self.group_of_row == mover] = place
        _move(self._prompt, places, movers)

    def _grown(
        self, buffers: dict[int, list[torch.Tensor]], layer: int, rows: int, positions: int, like_KSD: torch.Tensor
    ) -> list:
        """The layer's two buffers, enlarged where they hold fewer rows or positions. Zeros, because what a row does not
        use is multiplied by weights of zero."""
        pair = buffers.get(layer)
        held = (0, 0) if pair is None else (pair[0].shape[0], pair[0].shape[2])
        if rows > held[0] or positions > held[1]:
            sizes = [_size(need, old) for need, old in zip((rows, positions), held, strict=True)]
            grown = [like_KSD.new_zeros(sizes[0], len(like_KSD), sizes[1], like_KSD.shape[2]) for _ in range(2)]
            for new, old in zip(grown, pair or (), strict=False):
                new[: held[0], :, : held[1]] = old
            buffers[layer] = grown
            self.moves += 1
        return buffers[layer]


@dataclass(frozen=True)
class _Pass:
    """A pass, and what the cache holds after it: how many groups or rows, and the positions of the longest."""

    parts: list[_Prompts | _Rows | KeptRows]
    prompt_size: tuple[int, int]
    output_size: tuple[int, int]


class _Prompts:
    """The part of a pass that brings new prompts, one after another."""

    def __init__(self, groups: np.ndarray, lengths: np.ndarray, device: torch.device | str):
        self.tokens = int(lengths.sum())
        # Where each position goes: its group's place and its position there.
        self._groups_S = _tensor(groups.repeat(lengths), device)
        self._positions_S = _tensor(np.concatenate([np.arange(n) for n in lengths]), device)
        self._layout = torch.from_numpy(lengths[:, None])

    def attend(
        self,
        prompt: Any,
        output: Any,
        q_HSD: torch.Tensor,
        k_KSD: torch.Tensor,
        v_KSD: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        for buffer, new_KSD in zip(prompt, (k_KSD, v_KSD), strict=True):
            buffer[self._groups_S, :, self._positions_S] = new_KSD.transpose(0, 1)
        return packed_attention(q_HSD, k_KSD, v_KSD, self._layout, scale)


class _Rows:
    """The part of a pass that brings one token of every row; the arguments say what the cache holds before it.

    Its attention spans what the cache holds after the last of ``steps`` passes; what is not there yet is masked.
    """

    def __init__(
        self,
        prompt_lengths: np.ndarray,
        group_of_row: np.ndarray,
        length_of_row: np.ndarray,
        steps: int,
        device: torch.device | str,
    ):
        self.tokens = len(group_of_row)
        self._groups = len(prompt_lengths)
        # A query's place among its group's: [G, slots], the rest left empty.
        counts = np.bincount(group_of_row, minlength=self._groups)
        order = group_of_row.argsort(kind="stable")
        slots = np.empty_like(order)
        slots[order] = np.arange(self.tokens) - (counts.cumsum() - counts).repeat(counts)
        self._slots = int(counts.max())
        self._slot_of_row = _tensor(group_of_row * self._slots + slots, device)
        self._places, self._lengths = torch.arange(self.tokens, device=device), _tensor(length_of_row, device)
        self._longest_prompt, self._longest_output = int(prompt_lengths.max()), int(length_of_row.max()) + steps
        prompts = _tensor(prompt_lengths[group_of_row], device)
        self._steps_T = torch.arange(self._longest_output, device=device)
        own_RT = self._steps_T > self._lengths[:, None]
        absent_RT = torch.cat([torch.arange(self._longest_prompt, device=device) >= prompts[:, None], own_RT], dim=1)
        self._absent_R11T, self._absent_own_RT = absent_RT[:, None, None], absent_RT[:, self._longest_prompt :]

    def advance(self) -> None:
        self._lengths += 1
        torch.gt(self._steps_T, self._lengths[:, None], out=self._absent_own_RT)

    def attend(
        self,
        prompt: Any,
        output: Any,
        q_HRD: torch.Tensor,
        k_KRD: torch.Tensor,
        v_KRD: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        q_RHD, k_RKD, v_RKD = (t.transpose(0, 1) for t in (q_HRD, k_KRD, v_KRD))
        rows, heads, width = q_RHD.shape
        kv_heads = k_RKD.shape[1]
        for buffer, new_RKD in zip(output, (k_RKD, v_RKD), strict=True):
            buffer[self._places, :, self._lengths] = new_RKD
        keys_RKTD, values_RKTD = (buffer[:rows, :, : self._longest_output] for buffer in output)
        prompt_keys_GKPD, prompt_values_GKPD = (buffer[: self._groups, :, : self._longest_prompt] for buffer in prompt)
        q_RKMD = q_RHD.reshape(rows, kv_heads, heads // kv_heads, width) * (width**-0.5 if scale is None else scale)
        # All queries of a group meet its prompt's keys in one product: the prompt's cache is read once per group.
        scores_prompt = self._to_rows(self._to_groups(q_RKMD) @ prompt_keys_GKPD.transpose(2, 3), q_RKMD.shape[2])
        scores = torch.cat([scores_prompt, q_RKMD @ keys_RKTD.transpose(2, 3)], dim=-1)
        weights = scores.masked_fill_(self._absent_R11T, float("-inf")).float().softmax(dim=-1).to(q_RHD.dtype)
        weights_prompt, weights_own = weights.split([self._longest_prompt, self._longest_output], dim=-1)
        out = self._to_rows(self._to_groups(weights_prompt) @ prompt_values_GKPD, q_RKMD.shape[2])
        return (out + weights_own @ values_RKTD).reshape(rows, heads, width).transpose(0, 1)

    def _to_groups(self, tensor_RKMX: torch.Tensor) -> torch.Tensor:
        """[R, K, M, X] -> [G, K, slots * M, X]; empty slots are zero."""
        _, kv_heads, per_kv, last = tensor_RKMX.shape
        slots = tensor_RKMX.new_zeros(self._groups * self._slots, kv_heads, per_kv, last)
        slots[self._slot_of_row] = tensor_RKMX
        return slots.view(self._groups, self._slots, kv_heads, per_kv, last).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, tensor_GKYX: torch.Tensor, per_kv: int) -> torch.Tensor:
        """The inverse of ``_to_groups``."""
        groups, kv_heads, _, last = tensor_GKYX.shape
        slots = tensor_GKYX.view(groups, kv_heads, self._slots, per_kv, last).transpose(1, 2)
        return slots.reshape(groups * self._slots, kv_heads, per_kv, last)[self._slot_of_row]


class KeptRows:
    """As ``_Rows``, by a kernel that reads on the device how much there is: the same operations on the same tensors.

    Args:
        count: of rows. Those beyond the rows that there are see a prompt of no positions, and change nothing but what
            they have in the cache.
    """

    def __init__(self, count: int, device: torch.device | str):
        self.tokens = count
        self._held = torch.zeros(3, count, dtype=torch.int64, device=device)

    def load(self, prompt_lengths: np.ndarray, group_of_row: np.ndarray, length_of_row: np.ndarray) -> None:
        """What the cache holds before the pass; the arguments are those of ``_Rows``."""
        held = np.zeros(self._held.shape, dtype=np.int64)
        held[:, : len(group_of_row)] = group_of_row, prompt_lengths[group_of_row], length_of_row
        self._held.copy_(pinned(torch.from_numpy(held), self._held.device), non_blocking=True)

    def advance(self) -> None:
        self._held[2] += 1

    def attend(
        self,
        prompt: Any,
        output: Any,
        q_HRD: torch.Tensor,
        k_KRD: torch.Tensor,
        v_KRD: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        from nemo_brain.sampling.decode_kernels import attend

        q_RHD, k_RKD, v_RKD = (tensor.transpose(0, 1) for tensor in (q_HRD, k_KRD, v_KRD))
        scale = q_HRD.shape[2] ** -0.5 if scale is None else scale
        return attend(q_RHD, k_RKD, v_RKD, prompt, output, self._held, scale).transpose(0, 1)


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return sent(torch.from_numpy(array), device)


def _fill(array: np.ndarray, places: list[int], movers: list[int], leaving: int) -> np.ndarray:
    """The array without ``leaving`` elements, ``vacate``'s places filled."""
    array = array.copy()
    array[places] = array[movers]
    return array[: len(array) - leaving]


def _move(buffers: dict[int, list[torch.Tensor]], places: list[int], movers: list[int]) -> None:
    if places:
        for pair in buffers.values():
            for buffer in pair:
                buffer[places] = buffer[movers]


def _size(need: int, old: int) -> int:
    """Enough, and so much more than before that what is copied in all stays a multiple of what there is in the end."""
    return old if need <= old else -(-max(need, old + old // 2) // _BLOCK) * _BLOCK
