"""The key-value cache gives what packed attention gives on the complete rows, while groups come and rows go.

Shapes: H query heads, K key-value heads, S positions of a row, D head width.
"""

from __future__ import annotations

import pytest
import torch
from qkv import draw

from nemo_brain.model.attention import packed_attention
from nemo_brain.sampling.kv_cache import KVCache, vacate

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
        cache.advance()
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
