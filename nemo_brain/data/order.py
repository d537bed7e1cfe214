"""The order in which prompts are visited: a pure function of (seed, iteration), so that resuming needs no state."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nemo_brain.core.groups import Prompt


def prompts_of_iteration(prompts: Sequence[Prompt], iteration: int, count: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration: the next ``count`` of an endless sequence of shuffled epochs.

    Args:
        prompts: at least one prompt, in an order that does not change during the run.
        iteration: counted from 0.
        count: ``rollout.prompts_per_iteration``; windows go on across the ends of epochs, and may exceed an epoch.
        seed: the run's seed; epoch e is shuffled by (seed, e) alone.

    Returns:
        The prompts. The k-th occurrence of one within the iteration (k > 1) has ``#k`` appended to its id, so that it
        gets draws of its own.
    """
    chosen = []
    for index, occurrence in visits(len(prompts), iteration, count, seed):
        prompt = prompts[index]
        if occurrence > 1:
            prompt = dataclasses.replace(prompt, id=f"{prompt.id}#{occurrence}")
        chosen.append(prompt)
    return chosen


def visits(size: int, iteration: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The order behind ``prompts_of_iteration``, for ``size`` items of any kind: each visit's item, and which
    occurrence of it within the iteration it is, counted from 1."""
    seen: Counter[int] = Counter()
    order = []
    for visit in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(visit, size)
        index = int(_permutation(size, seed, epoch)[place])
        seen[index] += 1
        order.append((index, seen[index]))
    return order


def shuffled(size: int, key: str) -> list[int]:
    """The order of ``size`` items that ``key`` stands for: the same in every version of every library."""
    return sorted(range(size), key=lambda index: hashlib.sha256(f"{key}/{index}".encode()).digest())


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The items of an epoch in its order, int64."""
    # Sorting by a hash gives the same order in every version of every library.
    keys = bytearray()
    for index in range(size):
        keys += hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()[:8]
    return np.argsort(np.frombuffer(keys, dtype=">u8"), kind="stable")
