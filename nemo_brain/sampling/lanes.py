"""Rows on their way through the sampler: what a pass brings, and the lanes of rows that go through a pipeline together.

Shapes: R rows (outputs in flight), S positions of a packed row, T of them that need logits, K steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nemo_brain.core.groups import Prompt
from nemo_brain.host.send import pinned, sent
from nemo_brain.sampling.kv_cache import KeptRows, KVCache, vacate

_ROWS = 16  # passes whose tensors are kept have a multiple of so many rows, and a graph each


@dataclass
class OpenGroup:
    """A group in flight: the prompt, its place in the caller's list, and the rows that have ended."""

    index: int
    prompt: Prompt
    ended: dict[int, Row] = field(default_factory=dict)


@dataclass
class Row:
    """An output in flight; its log-probs are the sums so far."""

    group: OpenGroup
    output: int
    draws: np.ndarray
    tokens: list[int] = field(default_factory=list)
    proposal_logprob: float = 0.0
    policy_logprob: float = 0.0


@dataclass
class Pass:
    """One way through the pipeline, of the new groups' prompts and then the last token of every row, packed.

    ``select_T``: the positions that need logits. ``stage``: the virtual pipeline stage that the pass is at; ``hidden``:
    what it got there. ``steps``: how often the rows get a token, see ``Sampler._decode``; ``kept``: on these tensors.
    """

    lane: Lane
    new: list[OpenGroup]
    tokens_1S: torch.Tensor
    positions_1S: torch.Tensor
    select_T: torch.Tensor
    steps: int
    kept: Kept | None = None
    stage: int = 0
    hidden: torch.Tensor | None = None


class Kept:
    """What a pass of up to so many rows reads and writes, and, with CUDA, the graph that has been recorded of it.

    Args:
        rows, steps: at most.
    """

    def __init__(self, rows: int, steps: int, device: torch.device | str):
        self.rows = KeptRows(rows, device)
        self.inputs_2S = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.select_T = torch.arange(rows, device=device)
        self.uniforms_KR = torch.full((steps, rows), 0.5, dtype=torch.float64, device=device)
        self.drawn_K3R = torch.zeros(steps, 3, rows, dtype=torch.float64, device=device)
        self.k_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: Any = None
        self.moves = 0  # of the cache, when that was recorded


class Lane:
    """Rows that go through the pipeline together, in the order of this rank's cache of them.

    ``current``: the pass that they are in; None between passes. ``kept``: for passes of several steps, by the number of
    rows.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.rows: list[Row] = []
        self.current: Pass | None = None
        self.kept: dict[int, Kept] = {}

    def begin(self, admitted: list[OpenGroup], outputs: int, multiple: int, steps: int, most: int) -> None:
        """Prepares a pass, if there is anything for one; of ``steps`` tokens if no prompt comes with it.

        Args:
            most: steps of any pass whose tensors are kept; 0: none are.
        """
        if not admitted and not self.rows:
            return
        lengths = [len(group.prompt.token_ids) for group in admitted]
        tokens = [token for group in admitted for token in group.prompt.token_ids]
        positions = [position for length in lengths for position in range(length)]
        select = list(np.cumsum(lengths, dtype=int) - 1) + list(range(len(tokens), len(tokens) + len(self.rows)))
        tokens += [row.tokens[-1] for row in self.rows]
        positions += [len(row.group.prompt.token_ids) + len(row.tokens) - 1 for row in self.rows]
        steps = 1 if admitted else steps
        if steps > 1 and most:
            self._begin_kept(tokens, positions, math.lcm(multiple, _ROWS), steps, most)
            return
        padding = [0] * (-len(tokens) % multiple)
        self.cache.plan(lengths, outputs, steps)
        tokens_1S, positions_1S, select_T = (
            sent(torch.tensor(part), self.cache.device) for part in ([tokens + padding], [positions + padding], select)
        )
        self.current = Pass(self, admitted, tokens_1S, positions_1S, select_T, steps)

    def _begin_kept(self, tokens: list[int], positions: list[int], multiple: int, steps: int, most: int) -> None:
        rows = -(-len(tokens) // multiple) * multiple
        kept = self.kept.get(rows)
        if kept is None:
            kept = self.kept[rows] = Kept(rows, most, self.cache.device)
        inputs = torch.tensor([part + [0] * (rows - len(part)) for part in (tokens, positions)])
        kept.inputs_2S.copy_(pinned(inputs, kept.inputs_2S.device), non_blocking=True)
        self.cache.plan(steps=steps, kept=kept.rows)
        tokens_1S, positions_1S = kept.inputs_2S[:1], kept.inputs_2S[1:]
        self.current = Pass(self, [], tokens_1S, positions_1S, kept.select_T, steps, kept)

    def end(self, new_rows: list[Row]) -> None:
        """The pass has gone through all stages: the new rows take part from now on."""
        self.current = None
        self.rows += new_rows

    def drop(self, places: list[int]) -> None:
        """Takes rows out."""
        holes, movers = vacate(len(self.rows), places)
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[len(self.rows) - len(places) :]
        self.cache.drop(places)
