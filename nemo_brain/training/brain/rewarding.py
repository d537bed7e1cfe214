"""Rewards while sampling goes on: a thread that takes groups as they are finished."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from nemo_brain.core.groups import RewardedGroup, SampledGroup
from nemo_brain.core.ranks import in_thread

# Outputs that a reward is called with at least, but for the last: the number is fixed so that what a call holds, and
# with it the rounding of a reward that is a model, does not depend on timing.
_BATCH = 64

Score = Callable[[Sequence[SampledGroup]], list[RewardedGroup]]


class RewardThread:
    """Rewards groups in the order in which they are added. After a failure nothing more is asked of the reward.

    Args:
        score: calls the reward.
    """

    def __init__(self, score: Score):
        self.done: list[RewardedGroup] = []
        self._score = score
        self._gathering: list[SampledGroup] = []
        self._batches: queue.SimpleQueue[list[SampledGroup]] = queue.SimpleQueue()
        self._running: Future[list[RewardedGroup]] = in_thread(self._work, "reward")

    def add(self, group: SampledGroup) -> None:
        self._gathering.append(group)
        if sum(len(group.outputs) for group in self._gathering) >= _BATCH:
            self._batches.put(self._gathering)
            self._gathering = []

    def finish(self) -> list[RewardedGroup]:
        """All groups with their rewards, in the order in which they were added. Raises what the reward raised."""
        if self._gathering:
            self._batches.put(self._gathering)
        self.close()
        return self._running.result()

    def close(self) -> None:
        """Nothing more comes."""
        self._gathering = []
        self._batches.put([])

    def _work(self) -> list[RewardedGroup]:
        while batch := self._batches.get():
            self.done += self._score(batch)
        return self.done
