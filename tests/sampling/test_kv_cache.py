"""The key-value cache gives what packed attention gives on the complete rows, while groups come and rows go.

Shapes: H query heads, K key-value heads, S positions of a row, D head width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qkv import dense, draw

from nemo_brain.model.attention import packed_attention
from nemo_brain.sampling import kv_cache
from nemo_brain.sampling.kv_cache import KVCache, _size, vacate

PROMPTS = [3, 9, 1, 6, 12]
OUTPUTS, LENGTH = 3, 70  # past one block of 64 output positions
# In which pass a group's prompt comes, with how many others; the longest prompt comes last, into a cache in use.
JOINING = {0: [0, 1], 2: [2], 30: [3, 4]}
# How many tokens each row gets: single rows leave, whole groups, the last row; the rest end together.
TOKENS = [70, 5, 20, 3, 3, 4, 70, 69, 20, 1, 70, 2, 70, 70, 33]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cache_equals_packed_attention_on_the_complete_rows(kv_heads, padding):
    layout = [[prompt] + [LENGTH] * OUTPUTS for prompt in PROMPTS]
    starts = [sum(map(sum, layout[:g])) for g in range(len(layout))]
    output_starts = [starts[g] + prompt + i * LENGTH for g, prompt in enumerate(PROMPTS) for i in range(OUTPUTS)]
    layers = {layer: [t.detach() for t in draw(sum(map(sum, layout)), kv_heads, seed=layer)] for layer in (1, 2)}
    scales = {1: None, 2: 0.5}
    expected = {n: packed_attention(*qkv, torch.tensor(layout), scales[n]) for n, qkv in layers.items()}
    cache = KVCache("cpu")
    rows: list[int] = []  # in the cache's order
    fed = [0] * len(TOKENS)
    seen = set()
    step = 0
    while rows or step <= max(JOINING):
        new = JOINING.get(step, [])
        places = [starts[g] + position for g in new for position in range(PROMPTS[g])]
        places += [output_starts[row] + fed[row] for row in rows]
        seen.update(places)
        cache.plan([PROMPTS[g] for g in new], OUTPUTS)
        for n, qkv in layers.items():
            # Positions after the rows' own (sequence parallelism pads) hold garbage that must reach nobody.
            tokens = [torch.nn.functional.pad(t[:, places], (0, 0, 0, padding), value=7.0) for t in qkv]
            out = cache.attend(n, *tokens, scales[n])
            # The cache's softmax is fp32 (as a model's logits are); everything else is float64.
            torch.testing.assert_close(out[:, : len(places)], expected[n][:, places], atol=2e-6, rtol=0)
            assert out.shape[1] == len(places) + padding and not out[:, len(places) :].any()
        for row in rows:
            fed[row] += 1
        rows += [g * OUTPUTS + i for g in new for i in range(OUTPUTS)]
        leaving = [place for place, row in enumerate(rows) if fed[row] == TOKENS[row]]
        holes, movers = vacate(len(rows), leaving)
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        rows = rows[: len(rows) - len(leaving)]
        cache.drop(leaving)
        assert cache.length_of_row.tolist() == [fed[row] for row in rows]
        groups = [row // OUTPUTS for row in rows]
        assert [PROMPTS[g] for g in groups] == cache.prompt_lengths[cache.group_of_row].tolist()
        assert len(cache.prompt_lengths) == len(set(groups)), "a group leaves with its last row"
        step += 1
    assert fed == TOKENS and len(seen) == sum(PROMPTS) + sum(TOKENS)


def test_vacated_places_are_filled_by_the_last():
    for leaving in ([], [0], [4], [1, 3], [0, 1, 2, 3, 4], [2, 3, 4]):
        items = list(range(5))
        holes, movers = vacate(5, leaving)
        for hole, mover in zip(holes, movers, strict=True):
            items[hole] = items[mover]
        assert sorted(items[: 5 - len(leaving)]) == [i for i in range(5) if i not in leaving]
        assert len(holes) <= len(leaving), "no more moves than needed"


# One pass: the lengths of the prompts that it brings, and the places whose rows end with it.
PASSES = st.lists(st.tuples(st.lists(st.integers(1, 7), max_size=3), st.sets(st.integers(0, 11))), max_size=12)


@given(PASSES, st.integers(1, 4), st.sampled_from([1, 2, 4]))
@settings(derandomize=True, deadline=None, database=None, max_examples=80)
def test_cache_gives_what_dictionaries_of_keys_and_values_give(passes, outputs, kv_heads):
    """Whatever comes and goes in which pass, a row that ends with its prompt's pass too."""
    layers, groups, rows = (1, 2), itertools.count(), []
    known = {}  # by (group,) or (group, output): of each position, keys and values [K, D] by layer
    cache = KVCache("cpu")

    def expected(owner, layer, q_H1D):
        """Attention of the newest position: a prompt's, (group,), to itself; a row's, (group, output), to both."""
        seen = [pairs[layer] for part in dict.fromkeys([owner[:1], owner]) for pairs in known[part]]
        k, v = (torch.stack(tensors, dim=1) for tensors in zip(*seen, strict=True))
        return dense(q_H1D, k, v, torch.ones(1, len(seen), dtype=torch.bool))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_BLOCK", 3)  # so that buffers grow all the time
        for step, (lengths, ending) in enumerate(passes):
            new = [(next(groups),) for _ in lengths]
            fed = [owner for owner, length in zip(new, lengths, strict=True) for _ in range(length)] + rows
            if not fed:
                continue
            cache.plan(lengths, outputs)
            qkv = {n: [t.detach() for t in draw(len(fed), kv_heads, seed=2 * step + n)] for n in layers}
            wanted = {n: [] for n in layers}
            for place, owner in enumerate(fed):
                known.setdefault(owner, []).append({n: (k[:, place], v[:, place]) for n, (_, k, v) in qkv.items()})
                for n in layers:
                    wanted[n].append(expected(owner, n, qkv[n][0][:, place : place + 1]))
            for n in layers:
                out = cache.attend(n, *qkv[n], None)
                # The cache's softmax is fp32; everything else is float64.
                torch.testing.assert_close(out, torch.cat(wanted[n], dim=1), atol=2e-6, rtol=0)
            rows += [(*group, i) for group in new for i in range(outputs)]
            leaving = [place for place in range(len(rows)) if place in ending]
            holes, movers = vacate(len(rows), leaving)
            for hole, mover in zip(holes, movers, strict=True):
                rows[hole] = rows[mover]
            rows = rows[: len(rows) - len(leaving)]
            cache.drop(leaving)


def test_caches_grow_by_half():
    """What is copied in all stays a multiple of what there is in the end: by a block each time it would not."""
    assert [_size(1, 0), _size(64, 64), _size(65, 64), _size(257, 256), _size(1000, 256)] == [64, 64, 128, 384, 1024]
    sizes = [64]
    while sizes[-1] < 10_000:
        sizes.append(_size(sizes[-1] + 1, sizes[-1]))
    assert sum(sizes) < 4 * sizes[-1]
