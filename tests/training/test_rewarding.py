"""Rewards are asked for while sampling goes on: in order, in batches that do not depend on timing."""

from __future__ import annotations

import threading

import pytest

from nemo_brain.core.groups import Output, Prompt, RewardedGroup, SampledGroup, rewarded
from nemo_brain.training.brain.rewarding import RewardThread


def group(index: int, outputs: int) -> SampledGroup:
    return SampledGroup(Prompt(f"p{index}", "", [1]), [Output([index], "", True)] * outputs)


class Score:
    """Rewards an output with its group's number; ``failing``: the call that fails."""

    def __init__(self, failing: int | None = None):
        self.calls: list[list[str]] = []
        self.called = threading.Event()
        self._failing = failing

    def __call__(self, groups) -> list[RewardedGroup]:
        self.calls.append([one.prompt.id for one in groups])
        self.called.set()
        if len(self.calls) == self._failing:
            raise ValueError("the reward is out of order")
        return [rewarded(one, [float(one.outputs[0].token_ids[0])] * len(one.outputs)) for one in groups]


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [
        ([32] * 5, [["p0", "p1"], ["p2", "p3"], ["p4"]]),
        ([63, 1, 1], [["p0", "p1"], ["p2"]]),
        ([64, 200, 10, 10], [["p0"], ["p1"], ["p2", "p3"]]),
        ([3], [["p0"]]),
        ([], []),
    ],
)
def test_batches_have_64_outputs_at_least_but_for_the_last(sizes, calls):
    score = Score()
    rewards = RewardThread(score)
    groups = [group(index, size) for index, size in enumerate(sizes)]
    for one in groups:
        rewards.add(one)
    found = rewards.finish()
    assert score.calls == calls
    assert found == rewards.done == [rewarded(g, [float(i)] * len(g.outputs)) for i, g in enumerate(groups)]


def test_a_batch_is_rewarded_before_the_next_groups_come():
    score = Score()
    rewards = RewardThread(score)
    rewards.add(group(0, 40))
    assert not score.called.wait(0.05)
    rewards.add(group(1, 40))
    assert score.called.wait(20)
    rewards.add(group(2, 40))
    assert [one.prompt.id for one in rewards.finish()] == ["p0", "p1", "p2"]
    assert score.calls == [["p0", "p1"], ["p2"]]


def test_after_a_failure_nothing_more_is_asked_and_what_was_rewarded_stays():
    score = Score(failing=2)
    rewards = RewardThread(score)
    for index in range(5):
        rewards.add(group(index, 64))
    with pytest.raises(ValueError, match="the reward is out of order"):
        rewards.finish()
    assert score.calls == [["p0"], ["p1"]]
    assert rewards.done == [rewarded(group(0, 64), [0.0] * 64)]
