"""Weighted sums of rewards: their values, and whose failure it was."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import RewardError, compute_rewards, load_reward

OUTPUTS = ["a1", "22", "b", ""]
LETTERS = {
    "_target_": "nemo_brain.rewards.function.FunctionReward",
    "function": "nemo_brain.rewards.toy.letter_fraction",
}


def length(prompts, outputs, *, references, metadata, scale=1.0):
    return [scale * len(output) for output in outputs]


def fragile(prompts, outputs, *, references, metadata):
    return [1 / len(output) for output in outputs]


def empty_is_nan(prompts, outputs, *, references, metadata):
    return [1.0 if output else math.nan for output in outputs]


class Loading:
    """A reward that has to be loaded first."""

    def __init__(self, fails=False):
        self.fails, self.loaded = fails, False

    def load(self):
        if self.fails:
            raise FileNotFoundError("weights")
        self.loaded = True

    def __call__(self, prompts, outputs, *, references, metadata):
        assert self.loaded
        return [10.0] * len(outputs)


class Collective:
    """A reward that all ranks compute together."""

    collective = True


def function(name, **arguments) -> dict:
    return {"_target_": LETTERS["_target_"], "function": f"{__name__}.{name}", **arguments}


def weighted(*parts: dict):
    section = {"_target_": "nemo_brain.rewards.weighted.WeightedReward", "rewards": list(parts)}
    return make_reward(OmegaConf.create(section))


def score(reward) -> list[float]:
    return compute_rewards(reward, ["p"] * 4, OUTPUTS, references=[None] * 4, metadata=[{}] * 4)


def test_the_sum_is_weighted_and_its_parts_are_loaded():
    loading = {"_target_": f"{__name__}.Loading", "weight": 0.5}
    reward = weighted({**LETTERS, "weight": 2}, function("length", weight=-1.0, scale=3.0), loading)
    load_reward(reward)
    assert score(reward) == [2 * 0.5 - 6.0 + 5.0, 0.0 - 6.0 + 5.0, 2.0 - 3.0 + 5.0, 0.0 - 0.0 + 5.0]


def test_a_sum_may_hold_sums():
    inner = {"_target_": "nemo_brain.rewards.weighted.WeightedReward", "rewards": [function("length", weight=1)]}
    assert score(weighted({**inner, "weight": 3})) == [6.0, 6.0, 3.0, 0.0]


def test_the_part_that_fails_is_named_with_the_output():
    reward = weighted({**LETTERS, "weight": 1}, function("fragile", weight=1))
    with pytest.raises(RewardError) as caught:
        score(reward)
    assert str(caught.value) == (
        f"the reward WeightedReward: reward.rewards[1]: the reward {__name__}.fragile failed with ZeroDivisionError: "
        "division by zero, on output 3: '' to the prompt 'p'"
    )
    assert caught.value.index == 3


def test_the_part_that_gives_nan_is_named_or_its_output_skipped():
    inner = {"_target_": "nemo_brain.rewards.weighted.WeightedReward", "rewards": [function("empty_is_nan", weight=1)]}
    reward = weighted({**LETTERS, "weight": 1}, {**inner, "weight": 2})
    with pytest.raises(RewardError, match=r"reward\.rewards\[1\]: .*reward\.rewards\[0\]: .*returned nan for output 3"):
        score(reward)
    arguments = {"references": [None] * 4, "metadata": [{}] * 4}
    values = compute_rewards(reward, ["p"] * 4, OUTPUTS, **arguments, skip_nonfinite=True)
    assert [math.isnan(value) for value in values] == [False, False, False, True]
    with pytest.raises(RewardError):  # and then as before
        score(reward)


def test_a_part_that_cannot_be_loaded_is_named():
    reward = weighted({**LETTERS, "weight": 1}, {"_target_": f"{__name__}.Loading", "fails": True, "weight": 1})
    with pytest.raises(
        ValueError, match=r"WeightedReward cannot be loaded: .*reward\.rewards\[1\]: .*Loading cannot .*weights"
    ):
        load_reward(reward)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], r"reward\.rewards must be a list of \{weight: \.\.\., _target_"),
        ([LETTERS], r"reward\.rewards\[0\]\.weight must be a finite number, not None"),
        ([{**LETTERS, "weight": "1"}], r"reward\.rewards\[0\]\.weight must be a finite number, not '1'"),
        ([{**LETTERS, "weight": float("inf")}], r"reward\.rewards\[0\]\.weight must be a finite number"),
        ([{**LETTERS, "weight": 1}, {"weight": 1}], r"reward\.rewards\[1\]: reward\._target_ is missing"),
        ([{**LETTERS, "weight": 1, "x": 1}], r"reward\.rewards\[0\]: .*unexpected keyword argument 'x'"),
        (
            [{**LETTERS, "weight": 1}, {"_target_": f"{__name__}.Collective", "weight": 1}],
            r"reward\.rewards\[1\]: .*Collective is computed by all ranks .* WeightedReward calls .*HuggingFaceReward",
        ),
        (["letters"], r"reward\.rewards\[0\] must be \{weight"),
    ],
)
def test_parts_that_cannot_be_are_named(parts, match):
    with pytest.raises(ValueError, match=match):
        weighted(*parts)
