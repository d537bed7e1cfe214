"""Packed rows hold exactly the rows [x; y_i], and plans put every output into exactly one affordable micro-batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_brain.core.groups import Group, Output, Prompt
from nemo_brain.core.packing import LAYOUTS, Chunk, chunk_tokens, pack, plan


def make_groups(lengths: list[tuple[int, list[int]]]) -> list[Group]:
    """Groups of these prompt and output lengths, in which no token id occurs twice."""
    ids = itertools.count(100)
    return [
        Group(
            Prompt(f"p{index}", "", [next(ids) for _ in range(prompt)]),
            [Output([next(ids) for _ in range(length)], "", True) for length in outputs],
        )
        for index, (prompt, outputs) in enumerate(lengths)
    ]


def segments(batch) -> list[tuple[list[int], list[int], range]]:
    """What each segment of the row sees, by the layout alone: tokens, positions, and where in the row it lies."""
    tokens, positions = batch.tokens_1S[0].tolist(), batch.positions_1S[0].tolist()
    seen, start = [], 0
    for prefix, *lengths in batch.layout.tolist():
        shared, start = range(start, start + prefix), start + prefix
        for length in filter(None, lengths):
            own, start = range(start, start + length), start + length
            places = [*shared, *own]
            seen.append(([tokens[i] for i in places], [positions[i] for i in places], own))
    assert start <= batch.tokens, "the layout describes no more than the row"
    return seen


GROUPS = make_groups([(5, [3, 1, 4]), (1, [2, 2]), (2, [1]), (4, [6, 5, 7, 5])])
CHUNKS = [Chunk(3, (2, 0)), Chunk(0, (0, 1, 2)), Chunk(1, (1,)), Chunk(2, (0,)), Chunk(1, (0,)), Chunk(3, (1,))]


@pytest.mark.parametrize("pad_multiple", [1, 2, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_segment_is_its_row(layout, pad_multiple):
    batch = pack(GROUPS, CHUNKS, layout, pad_multiple)
    assert batch.rows == [(chunk.group, index) for chunk in CHUNKS for index in chunk.outputs]
    used = sum(chunk_tokens(GROUPS[chunk.group], chunk.outputs, layout) for chunk in CHUNKS)
    assert batch.tokens % pad_multiple == 0 and used <= batch.tokens < used + pad_multiple
    assert batch.layout.dtype == torch.int32 and int(batch.layout.sum()) == batch.tokens
    assert batch.tokens_1S.dtype == batch.positions_1S.dtype == batch.targets_T.dtype == torch.int64
    found = segments(batch)
    assert len(found) == len(batch.rows)
    for k, (group, index) in enumerate(batch.rows):
        x, y = GROUPS[group].prompt.token_ids, GROUPS[group].outputs[index].token_ids
        tokens, positions, own = found[k]
        assert tokens == (x + y)[:-1]
        assert positions == list(range(len(x) + len(y) - 1))
        mine = batch.output_of_target_T == k
        assert batch.targets_T[mine].tolist() == y
        assert batch.target_positions_T[mine].tolist() == list(own)[-len(y) :]
    assert batch.tokens_1S[0, used:].tolist() == [0] * (batch.tokens - used)
    if batch.tokens > used:
        assert batch.layout[-1].tolist() == [batch.tokens - used] + [0] * (batch.layout.shape[1] - 1)


def test_shared_prefix_computes_the_prompt_once():
    whole = [Chunk(0, (0, 1, 2))]
    shared, separate = (pack(GROUPS, whole, layout) for layout in LAYOUTS)
    assert shared.layout.tolist() == [[4, 3, 1, 4]] and shared.tokens == 4 + 3 + 1 + 4
    assert separate.layout.tolist() == [[0, 7, 5, 8]] and separate.tokens == 7 + 5 + 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad_multiple", [1, 4])
def test_an_empty_micro_batch_is_a_row_without_targets(layout, pad_multiple):
    batch = pack(GROUPS, [], layout, pad_multiple)
    assert batch.tokens == pad_multiple and batch.layout.tolist() == [[pad_multiple]]
    assert batch.rows == [] and batch.targets_T.tolist() == batch.target_positions_T.tolist() == []
    assert batch.targets_T.dtype == batch.target_positions_T.dtype == torch.int64
    assert batch.output_sums(torch.zeros(0)).shape == (0,)


def test_output_sums_adds_the_targets_of_each_output():
    batch = pack(GROUPS, CHUNKS, "shared_prefix", 4)
    values = torch.arange(len(batch.targets_T), dtype=torch.float64, requires_grad=True)
    sums = batch.output_sums(values)
    lengths = [len(GROUPS[g].outputs[i].token_ids) for g, i in batch.rows]
    assert sums.tolist() == [part.sum().item() for part in values.detach().split(lengths)]
    sums[2].backward()
    assert values.grad.tolist() == [float(k == 2) for k, length in enumerate(lengths) for _ in range(length)]


LENGTHS = st.lists(
    st.tuples(st.integers(1, 8), st.lists(st.integers(1, 12), min_size=1, max_size=7)), min_size=1, max_size=9
)


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.sampled_from(LAYOUTS), st.integers(1, 6), st.integers(1, 3))
def test_plan(lengths, budget, layout, ranks, multiple):
    groups = make_groups(lengths)
    planned = plan(groups, budget, layout, ranks, multiple)
    assert planned == plan(make_groups(lengths), budget, layout, ranks, multiple), "every rank computes the same"

    assert len(planned.ranks) == ranks
    counts = {len(batches) for batches in planned.ranks}
    assert len(counts) == 1, "every rank runs the same number of micro-batches"
    assert min(counts) > 0 and min(counts) % multiple == 0

    batches = [chunks for batches in planned.ranks for chunks in batches]
    placed = [(chunk.group, index) for chunks in batches for chunk in chunks for index in chunk.outputs]
    assert sorted(placed) == [(g, i) for g, group in enumerate(groups) for i in range(len(group.outputs))]

    costs = [[chunk_tokens(groups[chunk.group], chunk.outputs, layout) for chunk in chunks] for chunks in batches]
    for chunks, cost in zip(batches, costs, strict=True):
        assert pack(groups, chunks, layout).tokens == max(1, sum(cost))
        assert sum(cost) <= budget or [len(chunk.outputs) for chunk in chunks] == [1]

    # As many micro-batches as the fullest rank needs: two of its half-empty ones would have been one.
    per_rank = [[sum(cost) for cost in costs[r * min(counts) : (r + 1) * min(counts)]] for r in range(ranks)]
    for used in per_rank:
        assert sum(total <= budget // 2 for total in filter(None, used)) <= 1
    assert min(counts) < max(sum(map(bool, used)) for used in per_rank) + multiple

    # Balance: greedy placement leaves no two ranks further apart than the largest chunk.
    loads = [sum(used) for used in per_rank]
    assert max(loads) - min(loads) <= max(itertools.chain(*costs))

    split = {g for g in range(len(groups)) if sum(c.group == g for chunks in batches for c in chunks) > 1}
    assert planned.whole == (not split)
    if len(groups) >= ranks:
        everything = {g: chunk_tokens(group, range(len(group.outputs)), layout) for g, group in enumerate(groups)}
        assert split == {g for g, total in everything.items() if total > budget and len(groups[g].outputs) > 1}
    elif all(len(group.outputs) >= -(-ranks // len(groups)) for group in groups):
        assert min(loads) > 0, "fewer groups than ranks are split until every rank has work"


def test_one_group_is_spread_over_all_ranks():
    """Four outputs on three ranks: pieces of 2, 1 and 1, not 2, 2 and an idle rank."""
    planned = plan(make_groups([(3, [5, 5, 5, 5])]), 1000, "shared_prefix", ranks=3)
    sizes = [[len(chunk.outputs) for chunks in batches for chunk in chunks] for batches in planned.ranks]
    assert sorted(sizes) == [[1], [1], [2]] and not planned.whole


def test_plan_depends_on_lengths_only_and_keeps_whole_groups_together():
    lengths = [(3, [5, 5]), (3, [5, 5]), (2, [9, 9]), (4, [1, 1])]
    planned = plan(make_groups(lengths), 30, "shared_prefix", ranks=2)
    # Costs 12, 12, 19, 5: the longest to rank 0, both twelves to rank 1 (24 in one micro-batch of 30), the rest to 0.
    assert planned.ranks == [[[Chunk(2, (0, 1)), Chunk(3, (0, 1))]], [[Chunk(0, (0, 1)), Chunk(1, (0, 1))]]]
    assert planned.whole
