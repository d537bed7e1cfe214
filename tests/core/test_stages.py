"""Groups in their stages: what each must have, that none is changed afterwards, and what JSON gives back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nemo_brain.core.groups import (
    Group,
    Output,
    Prompt,
    RewardedGroup,
    SampledGroup,
    ScoredGroup,
    as_json,
    from_json,
    output_matrix,
    rewarded,
)

PROMPT = Prompt("p\ud800", "größe\u2028", [1, 2], "gold", {"messages": [{"role": "user"}], "n": None}, truncated=True)
OUTPUTS = [Output([3, 256], "a", True), Output([4], "", False)]
VECTORS = {
    "prior_logprobs": [-1.0, -1 / 3],
    "proposal_logprobs": [-0.1, -2.0],
    "policy_logprobs": [-5e-324, -1e308],
}
STAGES = {
    "group": Group(PROMPT, OUTPUTS),
    "sampled, nothing known": SampledGroup(PROMPT, OUTPUTS),
    "sampled": SampledGroup(PROMPT, OUTPUTS, **{**VECTORS, "prior_logprobs": None}),
    "rewarded": RewardedGroup(PROMPT, OUTPUTS, rewards=[0.1 + 0.2, -3.0], proposal_logprobs=[-1.0, -2.0]),
    "scored": ScoredGroup(PROMPT, OUTPUTS, rewards=[1.0, 0.0], **VECTORS),
}


@pytest.mark.parametrize("name", STAGES)
def test_json_gives_back_the_group_bit_by_bit(name):
    group = STAGES[name]
    text = json.dumps(as_json([group, group]))
    again = from_json(json.loads(text), type(group))
    assert again == [group, group] and {type(one) for one in again} == {type(group)}
    assert type(again[0].prompt) is Prompt and type(again[0].outputs[0]) is Output


def test_json_keeps_rewards_that_are_not_finite():
    group = RewardedGroup(PROMPT, OUTPUTS, rewards=[float("nan"), float("-inf")])
    (again,) = from_json(json.loads(json.dumps(as_json([group]))), RewardedGroup)
    assert repr(again.rewards) == "[nan, -inf]"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_not_changed(name):
    group = STAGES[name]
    for thing in (group, group.prompt, group.outputs[0]):
        for field in dataclasses.fields(thing):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.weights = [1.0]


def test_a_stage_needs_what_it_is_named_for():
    with pytest.raises(TypeError, match="rewards"):
        RewardedGroup(PROMPT, OUTPUTS)
    for missing in VECTORS:
        with pytest.raises(TypeError, match=missing):
            ScoredGroup(PROMPT, OUTPUTS, rewards=[1.0, 0.0], **{n: v for n, v in VECTORS.items() if n != missing})
    with pytest.raises(TypeError, match="rewards"):
        from_json(as_json([STAGES["sampled"]]), RewardedGroup)
    with pytest.raises(TypeError, match="rewards"):
        from_json(as_json([STAGES["rewarded"]]), SampledGroup)


def test_rewarded_keeps_what_is_known_and_leaves_the_group_as_it_was():
    sampled = STAGES["sampled"]
    before = as_json([sampled])
    first = rewarded(sampled, [1.0, 2.0])
    assert first == RewardedGroup(PROMPT, OUTPUTS, rewards=[1.0, 2.0], **{**VECTORS, "prior_logprobs": None})
    assert rewarded(first, [3.0, 4.0]).rewards == [3.0, 4.0] and first.rewards == [1.0, 2.0]
    assert as_json([sampled]) == before


def test_output_matrix_is_zero_where_a_group_has_no_such_output():
    few = RewardedGroup(PROMPT, OUTPUTS[:1], rewards=[-2.0])
    matrix_GN = output_matrix([STAGES["rewarded"], few], "rewards")
    assert matrix_GN.dtype == torch.float64
    assert matrix_GN.tolist() == [[0.1 + 0.2, -3.0], [-2.0, 0.0]]
