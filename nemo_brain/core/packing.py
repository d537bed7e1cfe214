"""How groups are laid out in the packed rows of micro-batches, and which rank and micro-batch takes what.

Shapes: G groups, N outputs per group, S positions of a row, T positions that carry a target, K outputs of a
micro-batch.

A micro-batch is one packed row without padding. It consists of blocks; a block is a causal prefix followed by segments
that attend to the prefix and to themselves, never to each other. Both layouts are such rows:

- shared prefix: ``[x_1 .. x_P-1] [x_P y_1] [x_P y_2] ...``, one block per group: the prompt is computed once;
- separate rows: no prefix, ``[x y_1] [x y_2] ...``: what a padded batch of n rows computes, without its padding.

Every output's segment starts with the last prompt token and drops the output's last token, so each position has at most
one target and positions restart at the same value in each segment. The attention needs nothing but the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_brain.core.groups import Group
from nemo_brain.host.send import sent

LAYOUTS = ("shared_prefix", "separate_rows")


@dataclass(frozen=True)
class Chunk:
    """Some outputs of one group: what a micro-batch takes of it. ``group`` indexes the caller's list of groups."""

    group: int
    outputs: tuple[int, ...]


@dataclass
class MicroBatch:
    """One packed row.

    tokens_1S, positions_1S: int64, the row; layout: int32 [blocks, 1 + segments], each block's prefix length and
    segment lengths, zero-padded; target_positions_T: int64, where in the row the T targets are predicted; targets_T:
    int64; output_of_target_T: int64, which of the micro-batch's K outputs a target belongs to; rows: (group, output) of
    each of the K outputs.
    """

    tokens_1S: torch.Tensor
    positions_1S: torch.Tensor
    layout: torch.Tensor
    target_positions_T: torch.Tensor
    targets_T: torch.Tensor
    output_of_target_T: torch.Tensor
    rows: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        return self.tokens_1S.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``; the layout stays on the host, where it is read."""
        moved = {
            name: sent(getattr(self, name), device)
            for name in ("tokens_1S", "positions_1S", "target_positions_T", "targets_T", "output_of_target_T")
        }
        return MicroBatch(layout=self.layout, rows=self.rows, **moved)

    def output_sums(self, token_values_T: torch.Tensor) -> torch.Tensor:
        """Sums a value per target over each output: [T] -> [K], in ``token_values_T``'s dtype."""
        sums_K = token_values_T.new_zeros(len(self.rows))
        return sums_K.index_add(0, self.output_of_target_T, token_values_T)


def chunk_tokens(group: Group, outputs: Sequence[int], layout: str) -> int:
    """The positions that these outputs of the group take in a packed row of the given layout."""
    prompt = len(group.prompt.token_ids)
    lengths = [len(group.outputs[i].token_ids) for i in outputs]
    if layout == "shared_prefix":
        return prompt - 1 + sum(lengths)
    return sum(prompt - 1 + length for length in lengths)


def pack(groups: Sequence[Group], chunks: Sequence[Chunk], layout: str, pad_multiple: int = 1) -> MicroBatch:
    """Lays chunks of groups out in one row.

    Args:
        groups: the groups that the chunks' indices refer to.
        chunks: what the row holds; an empty list gives a row without targets, which idle ranks run in step with others.
        layout: ``shared_prefix`` or ``separate_rows``.
        pad_multiple: the row's length is padded to a multiple of this (sequence parallelism needs the tensor-parallel
            size); the padding is a block of its own, so nothing attends to it.
    """
    tokens: list[int] = []
    positions: list[int] = []
    blocks: list[list[int]] = []
    target_positions: list[int] = []
    targets: list[int] = []
    output_of_target: list[int] = []
    rows: list[tuple[int, int]] = []
    for chunk in chunks:
        group = groups[chunk.group]
        prompt = group.prompt.token_ids
        prefix = len(prompt) - 1
        shared = layout == "shared_prefix"
        block = [prefix if shared else 0]
        if shared:
            tokens += prompt[:-1]
            positions += range(prefix)
        for index in chunk.outputs:
            output = group.outputs[index].token_ids
            if not shared:
                tokens += prompt[:-1]
                positions += range(prefix)
            start = len(tokens)
            tokens += [prompt[-1], *output[:-1]]
            positions += range(prefix, prefix + len(output))
            target_positions += range(start, start + len(output))
            targets += output
            output_of_target += [len(rows)] * len(output)
            rows.append((chunk.group, index))
            block.append(len(output) if shared else prefix + len(output))
        blocks.append(block)
    padding = -len(tokens) % pad_multiple if tokens else pad_multiple
    if padding:
        tokens += [0] * padding
        positions += range(padding)
        blocks.append([padding])
    width = max(len(block) for block in blocks)
    return MicroBatch(
        tokens_1S=torch.tensor([tokens]),
        positions_1S=torch.tensor([positions]),
        layout=torch.tensor([block + [0] * (width - len(block)) for block in blocks], dtype=torch.int32),
        target_positions_T=torch.tensor(target_positions, dtype=torch.int64),
        targets_T=torch.tensor(targets, dtype=torch.int64),
        output_of_target_T=torch.tensor(output_of_target, dtype=torch.int64),
        rows=rows,
    )


@dataclass
class Plan:
    """Which chunks go into which micro-batch of which data-parallel rank.

    ``ranks[r][m]`` lists the chunks of micro-batch m on rank r; every rank has the same number of micro-batches (idle
    ones are empty). ``whole``: every group is in one micro-batch, so the loss needs one pass only.
    """

    ranks: list[list[list[Chunk]]]
    whole: bool


def plan(
    groups: Sequence[Group], budget: int, layout: str, ranks: int = 1, multiple: int = 1, split: bool = True
) -> Plan:
    """Distributes groups over data-parallel ranks and micro-batches of at most ``budget`` tokens.

    A group stays whole where it fits the budget and there are at least as many groups as ranks; otherwise it is split
    into chunks of outputs. An output longer than the budget has a micro-batch to itself. The plan depends on lengths
    only, so every rank computes the same one.

    Args:
        groups: the groups of the global batch.
        budget: tokens per micro-batch.
        layout: one of ``LAYOUTS``.
        ranks: the data-parallel size.
        multiple: the number of micro-batches is made a multiple of this (interleaved pipeline schedules need it).
        split: without it every group stays whole; one that exceeds the budget has a micro-batch to itself.
    """
    pieces = -(-ranks // max(1, len(groups)))
    chunks: list[tuple[int, Chunk]] = []
    for index, group in enumerate(groups):
        parts = _split(group, pieces, budget, layout) if split else [tuple(range(len(group.outputs)))]
        for outputs in parts:
            chunks.append((chunk_tokens(group, outputs, layout), Chunk(index, outputs)))
    # Longest first onto the least loaded rank; ties by index keep the plan deterministic.
    chunks.sort(key=lambda item: (-item[0], item[1].group, item[1].outputs))
    loads = [0] * ranks
    bins: list[list[tuple[int, list[Chunk]]]] = [[] for _ in range(ranks)]
    for cost, chunk in chunks:
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += cost
        for i, (used, members) in enumerate(bins[rank]):
            if used + cost <= budget:
                members.append(chunk)
                bins[rank][i] = (used + cost, members)
                break
        else:
            bins[rank].append((cost, [chunk]))
    count = max(1, *(len(b) for b in bins))
    count += -count % multiple
    layouts = [[members for _, members in b] + [[] for _ in range(count - len(b))] for b in bins]
    return Plan(ranks=layouts, whole=len(chunks) == len(groups))


def _split(group: Group, pieces: int, budget: int, layout: str) -> list[tuple[int, ...]]:
    """The group's outputs in consecutive runs: at least ``pieces`` of them where there are as many outputs, each within
    the budget where one output is."""
    everything = tuple(range(len(group.outputs)))
    if pieces == 1 and chunk_tokens(group, everything, layout) <= budget:
        return [everything]
    runs: list[tuple[int, ...]] = []
    current: tuple[int, ...] = ()
    for index in everything:
        grown = (*current, index)
        next_piece = index * pieces // len(everything) > (index - 1) * pieces // len(everything)
        if current and (next_piece or chunk_tokens(group, grown, layout) > budget):
            runs.append(current)
            grown = (index,)
        current = grown
    return [*runs, current]
