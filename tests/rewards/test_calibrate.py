"""Gamma and centre from preference pairs: what is fitted is what made the pairs, and what cannot be fitted is said."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from schemas import file_keys, schema_keys
from scipy.special import expit
from toy_runs import ROOT, composed

from nemo_brain.config.calibrate import CalibrationConfig, check_calibration
from nemo_brain.objectives import make_objective
from nemo_brain.report.calibration import calibrate
from nemo_brain.rewards.calibrate import calibrate_reward


def drawn(gamma: float, pairs: int, seed: int) -> np.ndarray:
    """Rewards [P, 2] of pairs whose chosen output is drawn as a Bradley-Terry model with this gamma prefers."""
    draws = np.random.default_rng(seed)
    rewards_P2 = draws.normal(3.0, 2.0, size=(pairs, 2))
    swapped_P = draws.random(pairs) > expit((rewards_P2[:, 0] - rewards_P2[:, 1]) / gamma)
    rewards_P2[swapped_P] = rewards_P2[swapped_P][:, ::-1]
    return rewards_P2


def scored(prompts, outputs, *, references, metadata) -> list[float]:
    """Outputs are numbers."""
    return [float(output) for output in outputs]


def failing(prompts, outputs, *, references, metadata) -> list[float]:
    if "x" in outputs:
        raise RuntimeError("no x")
    return [1.0] * len(outputs)


def messages(prompts, outputs, *, references, metadata) -> list[float]:
    """The number of messages, and what the last one says."""
    return [
        len(data["messages"]) + float(data["messages"][-1]["content"] == output)
        for data, output in zip(metadata, outputs, strict=True)
    ]


def write(path: Path, pairs) -> Path:
    records = [{"prompt": "Say a number: ", "chosen": str(first), "rejected": str(second)} for first, second in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def configuration(tmp_path: Path, *overrides: str, reward: str = "scored", data: Path | None = None):
    data = tmp_path / "pairs.jsonl" if data is None else data
    function = f"reward.function={__file__}:{reward}"
    return composed("calibrate", function, f"data.preferences={data}", f"out={tmp_path}/fit/one.yaml", *overrides)


def loglik(gap_P: np.ndarray, gamma: float) -> float:
    return float(-np.logaddexp(0, -gap_P / gamma).sum())


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.0])
def test_the_gamma_that_made_the_pairs_is_in_its_interval_which_it_narrows_with_pairs(gamma):
    few, many = (calibrate(drawn(gamma, pairs, seed=2)) for pairs in (800, 12800))
    assert few.low < gamma < few.high and many.low < gamma < many.high
    # The width falls as the root of the number of pairs, which is four here.
    assert 2.5 < (few.high - few.low) / (many.high - many.low) < 6


def test_intervals_hold_the_gamma_about_as_often_as_they_say():
    hits = sum(found.low <= 1.0 <= found.high for found in (calibrate(drawn(1.0, 150, seed)) for seed in range(40)))
    # Of 40 at 95%, fewer than 34 would come once in 100 times.
    assert hits >= 34


def test_it_is_the_likeliest_and_half_of_the_answers_are_good_on_average():
    rewards_P2 = drawn(0.7, 300, seed=3)
    found, gap_P = calibrate(rewards_P2), rewards_P2[:, 0] - rewards_P2[:, 1]
    best = loglik(gap_P, found.gamma)
    assert best > max(loglik(gap_P, found.gamma * 0.999), loglik(gap_P, found.gamma * 1.001))
    assert expit((rewards_P2 - found.center) / found.gamma).mean() == pytest.approx(0.5, abs=1e-9)


def test_gamma_has_the_rewards_unit_and_the_centre_their_origin():
    rewards_P2 = drawn(0.7, 300, seed=3)
    found, scaled = calibrate(rewards_P2), calibrate(1e-6 * rewards_P2 + 5)
    # 5 + 1e-6 r has 10 digits of r in float64.
    assert (scaled.gamma, scaled.center - 5) == pytest.approx((1e-6 * found.gamma, 1e-6 * found.center), rel=1e-7)


def test_a_gamma_of_pairs_in_perfect_order_is_the_largest_that_they_allow():
    rewards_P2 = np.array([[1.0, 0.0], [3.0, 1.0], [0.5, 0.2], [2.0, 2.0], [4.0, 1.0]])
    found = calibrate(rewards_P2)
    assert found.separable and found.low == 0 and found.gamma == found.high
    ordered_P = np.array([1.0, 2.0, 0.3, 3.0])
    assert loglik(ordered_P, found.gamma) == pytest.approx(-1.92, abs=1e-6)


@pytest.mark.parametrize(
    "rewards, message",
    [
        ([], "there are no pairs"),
        ([[2, 2], [2, 2]], "all rewards are 2"),
        ([[2, 2], [1, 1]], "equal rewards in every pair"),
        ([[1, 2], [3, 1], [0, 5]], r"not above the rejected ones' on average \(-1.33\)"),
        ([[2, 1], [3, 1]], "2 pairs that the reward orders as they are say nothing of gamma"),
    ],
)
def test_where_no_gamma_fits_it_says_why(rewards, message):
    with pytest.raises(ValueError, match=message):
        calibrate(np.array(rewards, dtype=np.float64).reshape(-1, 2))


def test_the_command_writes_what_a_training_reads(tmp_path):
    rewards_P2 = drawn(0.7, 200, seed=3)
    write(tmp_path / "pairs.jsonl", rewards_P2)
    (tmp_path / "as_numbers.py").write_text(inspect.getsource(scored))
    arguments = ["reward.function=as_numbers.py:scored", "data.preferences=pairs.jsonl"]
    command = [sys.executable, "-m", "nemo_brain", "calibrate", *arguments]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pairs     200" in told and "--config-dir runs +calibrated=sigmoid" in told
    given = yaml.safe_load((tmp_path / "runs" / "calibrated" / "sigmoid.yaml").read_text())["objective"]
    found = calibrate(rewards_P2)
    assert given == {
        "goodness": "sigmoid",
        "goodness_center": pytest.approx(found.center, rel=1e-5),
        "gamma": pytest.approx(found.gamma, rel=1e-5),
    }
    make_objective("brain", **given)
    train = [sys.executable, "-m", "nemo_brain", "train", "--config-name", "toy", "--cfg", "job"]
    composed_by_hydra = subprocess.run(
        [*train, "--config-dir", "runs", "+calibrated=sigmoid"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    taken = yaml.safe_load(composed_by_hydra)["objective"]
    assert {name: taken[name] for name in given} == given and taken["name"] == "brain"


def test_it_warns_where_the_reward_orders_all_pairs_or_no_more_than_a_coin(tmp_path):
    write(tmp_path / "pairs.jsonl", [(2, 1), (3, 1), (5, 1), (4, 3)])
    with pytest.warns(UserWarning, match="prefers the chosen output of every pair"):
        assert calibrate_reward(configuration(tmp_path)).separable
    write(tmp_path / "pairs.jsonl", [(9, 1), (3, 4), (5, 6), (4, 3)])
    with pytest.warns(UserWarning, match="more often than a coin"):
        calibrate_reward(configuration(tmp_path))


def test_a_reward_gets_messages_and_templates_as_in_a_training(tmp_path):
    data = tmp_path / "pairs.jsonl"
    turn = {"role": "user", "content": "two"}
    sides = {name: [turn, {"role": "assistant", "content": name}] for name in ("two", "three")}
    lines = [{"chosen": sides["two"], "rejected": sides["three"]}] * 3
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="every pair"):
        found = calibrate_reward(configuration(tmp_path, "data.template=chat", reward="messages"))
    assert 1 < found.center < 2  # one message, whose text is the chosen output's
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: messages need a chat template \(set data\.template=chat"):
        calibrate_reward(configuration(tmp_path, reward="messages"))


@pytest.mark.parametrize(
    "pairs, reward, message",
    [
        ([(1, 2), (3, "nan")], "scored", r"pairs\.jsonl:2: the reward of the rejected output is nan"),
        ([("inf", 2)], "scored", r"pairs\.jsonl:1: the reward of the chosen output is inf"),
        (
            [(1, 2), (3, 4), ("x", 1)],
            "failing",
            r"pairs\.jsonl:3: the reward .*failing failed with RuntimeError",
        ),
        ([(1, 1)], "scored", r"pairs\.jsonl:1: chosen and rejected are the same"),
        ([(2, 1)] * 3, "failing", r"data\.preferences, reward: all rewards are 1: no gamma fits"),
        ([(1, 2)] * 3, "scored", r"reward: the chosen .* \(-1\): .*look at the reward's sign"),
        ([], "scored", r"data\.preferences: .*pairs\.jsonl is empty"),
    ],
)
def test_bad_pairs_and_rewards_are_named(tmp_path, pairs, reward, message):
    write(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(ValueError, match=message):
        calibrate_reward(configuration(tmp_path, reward=reward))
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("out=sigmoid.yaml", "out must be a .yaml file in a directory"),
        ("out=runs/calibrated/sigmoid", "out must be a .yaml file"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("data.forks=x", "data.forks must be one of refuse, cut"),
        ("+data.train=x", "unknown configuration key data.train"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        check_calibration(configuration(tmp_path, override))


def test_a_format_string_without_the_prompt_is_refused(tmp_path):
    write(tmp_path / "pairs.jsonl", [(2, 1)])
    with pytest.raises(ValueError, match=r"data\.template: 'no' has no \{prompt\}"):
        calibrate_reward(configuration(tmp_path, "data.template=no"))


def test_the_file_states_every_key_with_its_default():
    given = composed("calibrate", "reward.function=x", "data.preferences=x")
    schema = schema_keys(CalibrationConfig)
    assert file_keys(yaml.safe_load((ROOT / "conf" / "calibrate.yaml").read_text()), schema) >= schema
    config, default = check_calibration(given), CalibrationConfig()
    assert (config.out, config.seed, config.batch_size) == (default.out, default.seed, default.batch_size)
    assert (config.data.forks, config.data.template) == (default.data.forks, default.data.template)
