"""The reward protocol, function rewards and making a reward from a configuration."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_brain.core.groups import Output, Prompt, RewardedGroup, SampledGroup
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.function import FunctionReward
from nemo_brain.rewards.protocol import compute_rewards, score_groups, score_groups_in_step
from nemo_brain.rewards.toy import letter_fraction

OUTPUTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def compute(reward, outputs=OUTPUTS):
    count = len(outputs)
    prompts = [f"p{index}" for index in range(count)]
    return compute_rewards(reward, prompts, outputs, references=[None] * count, metadata=[{}] * count)


def returning(value):
    def fixed(prompts, outputs, *, references, metadata):
        return value

    return fixed


def length(prompts, outputs, *, references, metadata, scale=1.0):
    return [scale * len(output) for output in outputs]


def test_score_groups_calls_the_reward_once_and_keeps_what_is_known_of_the_groups():
    calls = []

    def reward(prompts, outputs, *, references, metadata):
        calls.append((prompts, outputs, references, metadata))
        return [1.0, 2.0, 3.0]

    outputs = [Output([1], text, text != "w") for text in "uvw"]
    one = SampledGroup(Prompt("a", "x", [1], "gold", {"k": 1}), outputs[:2], proposal_logprobs=[-1.0, -2.0])
    two = RewardedGroup(Prompt("b", "y", [1]), outputs[2:], prior_logprobs=[-3.0], rewards=[9.0])
    rewarded = score_groups(reward, [one, two])
    assert calls == [(["x", "x", "y"], ["u", "v", "w"], ["gold", "gold", None], [{"k": 1}, {"k": 1}, {}])]
    assert rewarded == [
        RewardedGroup(one.prompt, one.outputs, proposal_logprobs=[-1.0, -2.0], rewards=[1.0, 2.0]),
        RewardedGroup(two.prompt, two.outputs, prior_logprobs=[-3.0], rewards=[3.0]),
    ]
    assert two.rewards == [9.0]


def test_score_groups_in_step_checks_what_the_reward_returns():
    """The same groups with rewards as from a reward that is called by one rank alone."""

    class Collective:
        collective, name = True, "mine"

        def score(self, groups, alone):
            assert alone
            return [[float(len(output.text)) for output in group.outputs] for group in groups]

    def group(id_, *texts):
        return SampledGroup(
            Prompt(id_, "x", [1]), [Output([1], text, True) for text in texts], policy_logprobs=[-1.0] * len(texts)
        )

    groups = [group("a", "", "b"), group("b", "ccc")]
    rewarded = score_groups_in_step(Collective(), groups, alone=True)
    assert [one.rewards for one in rewarded] == [[0.0, 1.0], [3.0]]
    assert rewarded == [
        RewardedGroup(one.prompt, one.outputs, policy_logprobs=one.policy_logprobs, rewards=rewards)
        for one, rewards in zip(groups, [[0.0, 1.0], [3.0]], strict=True)
    ]
    Collective.score = lambda self, groups, alone: [[0.0, 1.0], [float("nan")]]
    with pytest.raises(ValueError, match=r"the reward mine returned nan for output 2: 'ccc' to the prompt 'x'"):
        score_groups_in_step(Collective(), groups, alone=True)
    *_, last = score_groups_in_step(Collective(), groups, alone=True, skip_nonfinite=True)
    assert np.isnan(last.rewards).all()


@pytest.mark.parametrize(
    "value",
    [
        [0, 1, True, 0.5, -2],
        (0.0, 1.0, 1.0, 0.5, -2.0),
        np.array([0, 1, 1, 0.5, -2], dtype=np.float32),
        torch.tensor([0, 1, 1, 0.5, -2], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(0), np.int64(1), np.bool_(True), torch.tensor(0.5), torch.tensor([-2])],
    ],
)
def test_python_numpy_and_torch_numbers_are_taken(value):
    rewards = compute(returning(value))
    assert rewards == [0.0, 1.0, 1.0, 0.5, -2.0]
    assert {type(reward) for reward in rewards} == {float}


def test_no_outputs_call_no_reward():
    assert compute(returning(None), []) == []


NAMED = r"the reward returning.<locals>.fixed returned "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a NoneType .return a list of one number per output"),
        (0.5, "a float .return a list"),
        (np.array(0.5), "a ndarray .return a list"),
        ({"a": 1}, "a dict .return a list"),
        ("12345", "a str .return a list"),
        ([1.0] * 4, r"4 rewards for 5 outputs .return one number per output.*output 4: 'eeeee' to the prompt 'p4'"),
        ([1.0] * 9, "9 rewards for 5 outputs"),
        ([], "0 rewards for 5 outputs.*output 0: 'a' to the prompt 'p0'"),
        ([1, 2, "3", 4, 5], "'3' for output 2: 'ccc' to the prompt 'p2' .return one finite number"),
        ([1, None, 3, 4, 5], "None for output 1: 'bb'"),
        ([1, 2, 3, 1j, 5], "1j for output 3: 'dddd'"),
        ([1, float("nan"), float("inf"), 4, 5], "nan for output 1: 'bb' to the prompt 'p1' .return one finite number"),
        ([1, 2, 3, 4, -float("inf")], "-inf for output 4: 'eeeee'"),
        ([10**400, 2, 3, 4, 5], r"1000+\.\.\. .401 characters. for output 0"),
        (np.array([1, 2, np.nan, 4, 5]), "nan for output 2: 'ccc'"),
        (torch.ones(5, 2), r"\[1.0, 1.0\] for output 0: 'a'"),
        ([torch.ones(2)] * 5, r"tensor\(\[1., 1.\]\) for output 0"),
        ([np.ones(2)] * 5, r"array\(\[1., 1.\]\) for output 0"),
    ],
)
def test_a_wrong_return_value_names_the_reward_and_the_output(value, message):
    with pytest.raises(ValueError, match=f"^{NAMED}{message}"):
        compute(returning(value))


def test_nan_and_infinities_are_handed_on_where_they_are_to_be_skipped_and_nothing_else_is():
    nan, inf = float("nan"), float("inf")
    values = compute_rewards(
        returning([nan, np.float32(-inf), 1, 10**400]),
        ["p"] * 4,
        ["a"] * 4,
        references=[None] * 4,
        metadata=[{}] * 4,
        skip_nonfinite=True,
    )
    assert str(values) == "[nan, -inf, 1.0, inf]"
    for wrong in (None, "nan", 1j):
        with pytest.raises(
            ValueError, match=r"for output 0: 'a' to the prompt 'p' \(return one finite number per output\)"
        ):
            compute_rewards(returning([wrong]), ["p"], ["a"], references=[None], metadata=[{}], skip_nonfinite=True)


def test_long_texts_are_shortened():
    with pytest.raises(ValueError) as caught:
        compute(returning([float("nan")]), ["x" * 10_000])
    assert "10002 characters" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("bad", [{0}, {3}, {4}, {1, 3}, {0, 1, 2, 3, 4}])
def test_a_failing_function_is_pinned_to_its_first_output(bad):
    def fragile(prompts, outputs, *, references, metadata):
        if any(OUTPUTS.index(output) in bad for output in outputs):
            raise KeyError("answer")
        return [0.0] * len(outputs)

    first = min(bad)
    message = rf"fragile failed with KeyError: 'answer', on output {first}: '{OUTPUTS[first]}' to the prompt 'p{first}'"
    with pytest.raises(ValueError, match=message) as caught:
        compute(fragile)
    assert isinstance(caught.value.__cause__, KeyError)


class Counting:
    """A reward that always fails and counts its calls."""

    def __init__(self, error):
        self.calls, self.error = 0, error

    def __call__(self, prompts, outputs, *, references, metadata):
        self.calls += 1
        raise self.error


def test_only_local_rewards_are_called_again_after_a_failure():
    several_ranks = Counting(RuntimeError("out of memory"))
    message = "the reward Counting failed with RuntimeError: out of memory, on a batch of 5 from output 0: 'a' to the"
    with pytest.raises(ValueError, match=message):
        compute(several_ranks)
    assert several_ranks.calls == 1
    connection = Counting(ConnectionError("refused"))
    connection.rescorable, connection.name = True, "judge"
    with pytest.raises(ValueError, match="the reward judge failed with ConnectionError: refused, on a batch of 5"):
        compute(connection)
    assert connection.calls == 1


def test_a_failure_of_the_whole_batch_blames_no_output():
    def small_batches(prompts, outputs, *, references, metadata):
        if len(outputs) == 5:
            raise MemoryError("too many")
        return [0.0] * len(outputs)

    with pytest.raises(ValueError, match="failed with MemoryError: too many, on a batch of 5 from output 0"):
        compute(small_batches)


# Function rewards


def test_function_reward_by_dotted_path_binds_its_arguments():
    assert compute(FunctionReward("nemo_brain.rewards.toy.letter_fraction"), ["a", "1b", "22"]) == [1.0, 0.5, 0.0]
    assert compute(FunctionReward(f"{__name__}.length", scale=2.0)) == [2.0, 4.0, 6.0, 8.0, 10.0]


def test_function_reward_from_a_file(tmp_path, monkeypatch):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def reward(prompts, outputs, *, references, metadata, value=FACTOR):\n"
        "    return [Score(value).value for _ in outputs]\n"
    )
    for directory, factor in (("a", "1.0"), ("b", "2.0")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "my_reward.py").write_text(source.replace("FACTOR", factor))
    monkeypatch.chdir(tmp_path)
    one, two = FunctionReward("a/my_reward.py:reward"), FunctionReward(f"{tmp_path}/b/my_reward.py:reward")
    assert (compute(one), compute(two)) == ([1.0] * 5, [2.0] * 5)  # files of one name are two modules


def test_function_reward_failures_name_the_function_and_the_output(tmp_path):
    path = tmp_path / "fragile.py"
    path.write_text(
        "def f(prompts, outputs, *, references, metadata):\n    return [1 / (len(o) - 3) for o in outputs]\n"
    )
    with pytest.raises(ValueError, match=r"fragile.py:f failed with ZeroDivisionError: .*, on output 2: 'ccc'"):
        compute(FunctionReward(f"{path}:f"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_package.sub.reward", "reward.function: there is no module 'no_such_package' .install it"),
        ("nemo_brain.nothing.reward", "reward.function: there is no module 'nemo_brain.nothing' .*PYTHONPATH"),
        ("nemo_brain.rewards.toy.letters", "nemo_brain.rewards.toy has no 'letters' .define it there"),
        ("nemo_brain.rewards.protocol.SHOWN", "reward.function=.* is a int, not callable .name a function"),
        ("reward", "reward.function='reward' names no function .write package.module.name or path"),
        ("a.b.", "reward.function='a.b.' names no function"),
        ("my.py:", "reward.function='my.py:' names no function"),
        (3, "reward.function=3 names no function"),
        ("nowhere/my.py:reward", "there is no file .*/nowhere/my.py .relative paths start at the working directory"),
        ("math.sqrt", r"reward.function=math.sqrt cannot be called: .*define it as .prompts, outputs, \*"),
        ("builtins.max", "reward.function=builtins.max cannot be called: .*define it as .prompts, outputs"),
    ],
)
def test_function_paths_that_lead_nowhere(function, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(function)


def test_function_reward_refuses_arguments_that_the_function_lacks():
    with pytest.raises(
        ValueError, match=r"unexpected keyword argument 'scales'.*other keys of the reward section: scales"
    ):
        FunctionReward(f"{__name__}.length", scales=2.0)


def test_errors_while_importing_are_shown(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, body, message in (
        ("broken", "1 / 0", "importing broken failed with ZeroDivisionError: division by zero .correct it there"),
        ("needy", "import no_such_dependency", "importing needy failed with ModuleNotFoundError: .*no_such_dependency"),
    ):
        (tmp_path / f"{name}_reward.py").write_text(body)
        for function in (f"{name}_reward.f", f"{tmp_path}/{name}_reward.py:f"):
            with pytest.raises(ValueError, match=message.replace(f"importing {name}", f"importing .*{name}_reward.*")):
                FunctionReward(function)


# Making a reward


def test_make_reward_instantiates_the_section():
    section = {
        "_target_": "nemo_brain.rewards.function.FunctionReward",
        "function": f"{__name__}.length",
        "scale": "${factor}",
    }
    cfg = OmegaConf.create({"factor": 3.0, "reward": section})
    assert compute(make_reward(cfg.reward)) == [3.0, 6.0, 9.0, 12.0, 15.0]


def test_make_reward_gives_plain_containers():
    function = {"_target_": f"{__name__}.Counting", "error": {"a": [1]}}
    assert json.dumps(make_reward(OmegaConf.create(function)).error) == '{"a": [1]}'


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (None, "reward._target_ is missing .name a reward class; for a function of your own: _target_="),
        ({}, "reward._target_ is missing"),
        ({"function": "x"}, "reward._target_ is missing"),
        (
            {"_target_": "nemo_brain.rewards.Nothing"},
            "reward._target_=nemo_brain.rewards.Nothing cannot be made: .*for a",
        ),
        (
            {"_target_": "nemo_brain.rewards.toy.letter_fraction"},
            "cannot be made: .*missing 2 required positional.*for a",
        ),
        ({"_target_": "builtins.dict"}, "reward._target_=builtins.dict makes a dict, which is not callable"),
        (
            {"_target_": "nemo_brain.rewards.function.FunctionReward", "function": "no_such.reward"},
            "cannot be made: .*reward.function: there is no module 'no_such'",
        ),
    ],
)
def test_make_reward_errors_name_the_key(cfg, message):
    for section in (cfg, None if cfg is None else OmegaConf.create(cfg)):
        with pytest.raises(ValueError, match=message):
            make_reward(section)


def test_letter_fraction_is_a_fraction_of_the_characters():
    rewards = letter_fraction([""] * 4, ["", "aZ", "é12b", "123"], references=[None] * 4, metadata=[{}] * 4)
    assert rewards == [0.0, 1.0, 0.25, 0.0]
