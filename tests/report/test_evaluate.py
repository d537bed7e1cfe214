"""Held-out statistics against scipy and numbers worked out by hand; the win-rate interval's coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from nemo_brain.core.groups import Output, Prompt, ScoredGroup
from nemo_brain.report.evaluate import (
    evaluate,
    mean_interval,
    paired_tests,
    rollout_metrics,
    win_rate_interval,
    win_score,
)


def group(name, rewards, policy=None, prior=None, lengths=None, ended=True):
    count = len(rewards)
    return ScoredGroup(
        Prompt(id=name, text="x", token_ids=[1]),
        [Output([1] * length, "y", ended) for length in lengths or [3] * count],
        rewards=list(rewards),
        policy_logprobs=policy or [-1.0] * count,
        prior_logprobs=prior or [-1.0] * count,
        proposal_logprobs=[math.nan] * count,  # of no account in any statistic
    )


def groups(rewards):
    return [group(f"p{i}", row) for i, row in enumerate(rewards)]


def test_the_prompt_is_the_unit():
    # A prompt with four outputs counts as much as one with a single output: (0 + 4) / 2, not 4 / 5.
    result = evaluate(groups([[0, 0, 0, 0], [1]]), groups([[0, 0, 0, 0], [4]]))
    assert result.reward.mean == 2.0
    assert result.start_reward.mean == 0.5
    assert result.reward_difference.mean == 1.5


def test_mean_interval_is_the_t_interval():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    got = mean_interval(values)
    assert (got.mean, got.low, got.high) == pytest.approx((4.0, low, high), rel=1e-12)
    # By hand: sd = sqrt(38/3), t(0.975, 3) = 3.18245, half-width = t * sd / 2.
    assert got.high - got.mean == pytest.approx(3.182446 * math.sqrt(38 / 3) / 2, rel=1e-6)


def test_p_values_match_scipys_paired_tests():
    rng = np.random.default_rng(3)
    before, after = rng.normal(size=12), rng.normal(0.4, 1.5, size=12)
    result = evaluate(groups(before[:, None]), groups(after[:, None]))
    assert result.p_value == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=1e-9)
    assert result.p_value_wilcoxon == pytest.approx(stats.wilcoxon(after, before).pvalue, rel=1e-9)
    # An unpaired test would give something else.
    assert result.p_value != pytest.approx(stats.ttest_ind(after, before).pvalue, rel=1e-3)


@pytest.mark.parametrize(
    "differences, t_is_nan, wilcoxon",
    [
        ([0.0, 0.0, 0.0], True, math.nan),
        ([0.7], True, math.nan),
        # Equal gains say nothing of their spread; their signs still do: 2 / 2^6.
        ([0.3 - 0.2] * 3 + [0.1] * 3, True, 2 / 64),
    ],
)
def test_differences_without_spread_have_no_t_test(differences, t_is_nan, wilcoxon):
    p_value, p_value_wilcoxon = paired_tests(np.array(differences))
    assert math.isnan(p_value) is t_is_nan
    assert p_value_wilcoxon == pytest.approx(wilcoxon, nan_ok=True)


def test_one_prompt_has_means_but_no_intervals():
    metrics = evaluate(groups([[0.0]]), groups([[1.0]])).as_metrics()
    assert (metrics["eval/reward"], metrics["eval/win_rate"], metrics["eval/prompts"]) == (1.0, 1.0, 1)
    assert math.isnan(metrics["eval/reward_ci_low"]) and math.isnan(metrics["eval/p_value"])
    assert 0.0 < metrics["eval/win_rate_ci_low"] < 0.5


def test_win_score_counts_all_pairs_and_ties_as_half():
    # Pairs: 1>0, 1=1, 1<2, 3>0, 3>1, 3>2: four wins, one tie, one loss.
    assert win_score([1.0, 3.0], [0.0, 1.0, 2.0]) == pytest.approx(4.5 / 6)


def test_a_model_neither_wins_nor_loses_against_itself():
    start = groups([[0.0, 2.0], [1.0, 1.0], [3.0, -1.0]])
    result = evaluate(start, start)
    assert result.win_rate.mean == 0.5
    assert result.reward_difference.mean == 0.0
    assert math.isnan(result.p_value) and math.isnan(result.p_value_wilcoxon)


def test_win_rate_interval_is_wilsons():
    scores = np.array([1.0] * 7 + [0.0] * 3)
    low, high = stats.binomtest(7, 10).proportion_ci(0.95, method="wilson")
    got = win_rate_interval(scores)
    assert (got.mean, got.low, got.high) == pytest.approx((0.7, low, high), rel=1e-9)
    # All wins: a percentile bootstrap would claim certainty. Wilson: n / (n + z^2).
    unanimous = win_rate_interval(np.ones(10))
    assert (unanimous.low, unanimous.high) == pytest.approx((10 / (10 + 1.959964**2), 1.0), rel=1e-6)


@pytest.mark.parametrize(
    "lose, tie, win, prompts",
    [(0.5, 0.0, 0.5, 20), (0.2, 0.1, 0.7, 10), (0.25, 0.5, 0.25, 12), (0.1, 0.2, 0.7, 40), (0.05, 0.0, 0.95, 20)],
)
def test_win_rate_interval_covers(lose, tie, win, prompts):
    # Counts are discrete, so coverage moves around 95%; the lowest here is that of 95% wins on 20 prompts, exactly
    # P(k >= 18) = 0.9245. 4000 draws have a standard error of 0.0042 there, hence 0.9245 - 3 * 0.0042 = 0.912.
    rng = np.random.default_rng(0)
    truth = win + tie / 2
    draws = rng.choice([0.0, 0.5, 1.0], p=[lose, tie, win], size=(4000, prompts))
    intervals = [win_rate_interval(row) for row in draws]
    coverage = np.mean([i.low <= truth <= i.high for i in intervals])
    assert coverage >= 0.912
    # Not by being vacuous: at most 1.1 times as wide as a normal interval of a sure Bernoulli trial.
    assert np.mean([i.high - i.low for i in intervals]) < 1.1 * 2 * 1.96 * math.sqrt(0.25 / prompts)


def test_a_t_interval_would_not_cover_a_high_win_rate():
    # Why the win-rate has an interval of its own: all 20 won (36% of the time) leaves a t interval no width at all.
    draws = np.random.default_rng(0).choice([0.0, 1.0], p=[0.05, 0.95], size=(1000, 20))
    assert np.mean([i.low <= 0.95 <= i.high for i in map(mean_interval, draws)]) < 0.7


def test_mean_interval_covers():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(row) for row in rng.normal(0.3, 2.0, size=(4000, 6))]
    # Exact for normal values: 0.95 with a standard error of 0.0035.
    assert np.mean([i.low <= 0.3 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.0105)


def test_kl_averages_outputs_then_prompts():
    current = [
        group("p0", [0, 0], policy=[-1.0, -2.0], prior=[-3.0, -8.0]),  # mean of 2 and 6
        group("p1", [math.nan], policy=[-1.0], prior=[-2.0]),  # its reward is of no account here
    ]
    result = evaluate(groups([[0], [0]]), current)
    for i, name in enumerate(("p0", "p1")):
        assert current[i].prompt.id == name
    assert result.kl_to_prior.mean == pytest.approx(2.5)
    assert evaluate(groups([[0]]), groups([[0]])).kl_to_prior.mean == 0.0


def test_references_are_a_ceiling_where_given():
    start = groups([[0.0], [1.0]])
    assert evaluate(start, start, [2.0, None]).as_metrics()["eval/reference_reward"] == 2.0
    assert "eval/reference_reward" not in evaluate(start, start).as_metrics()
    assert evaluate(start, start, [None, None]).reference_reward is None


def test_different_prompts_are_refused():
    with pytest.raises(ValueError, match="same held-out prompts"):
        evaluate(groups([[0], [0]]), groups([[0], [0]])[::-1])
    with pytest.raises(ValueError, match="at least one"):
        evaluate([], [])


def test_rewards_that_are_not_finite_are_left_out_of_the_statistics():
    nan, inf = math.nan, math.inf
    start = groups([[0.0, nan], [1.0], [nan], [2.0]])
    current = groups([[1.0, 3.0], [inf, 2.0], [5.0], [-inf]])
    result = evaluate(start, current, [nan, 4.0, None, None])
    assert (result.prompts, result.nonfinite, result.reference_reward) == (2, 2, 4.0)
    assert (result.start_reward.mean, result.reward.mean, result.reward_difference.mean) == (0.5, 2.0, 1.5)
    assert result.win_rate.mean == 1.0
    with pytest.raises(ValueError, match=r"for no held-out prompt does the reward give .* a finite number"):
        evaluate(groups([[nan], [1.0]]), groups([[1.0], [nan]]))
    metrics = rollout_metrics([group("a", [1.0, nan]), group("b", [2.0, 4.0])], n=2)
    assert (metrics["reward/nonfinite"], metrics["reward/best_of_n"]) == (1, 4.0)
    assert metrics["reward/mean"] == pytest.approx(7 / 3)
    assert "reward/mean" not in rollout_metrics([group("a", [nan, inf])], n=2)


def test_rollout_metrics_by_hand():
    rollout = [
        group("a", [1.0, 3.0], policy=[-4.0, -6.0], prior=[-5.0, -9.0], lengths=[2, 4]),
        group("b", [0.0, -2.0], policy=[-1.0, -1.0], prior=[-1.5, -1.25], lengths=[6, 8], ended=False),
    ]
    assert rollout_metrics(rollout, n=2, proposal_gap=0.25) == pytest.approx(
        {
            "reward/nonfinite": 0,
            "reward/mean": 0.5,
            "reward/std": math.sqrt((0.25 + 6.25 + 0.25 + 6.25) / 4),
            "reward/best_of_n": 1.5,
            "kl_to_prior": (1 + 3 + 0.5 + 0.25) / 4,
            "proposal_gap": 0.25,
            "prompts/truncated_fraction": 0.0,
            "outputs/length": 5.0,
            "outputs/ended_fraction": 0.5,
        }
    )


def test_rollout_metrics_leave_out_what_is_unknown():
    unrewarded = rollout_metrics([group("a", [math.nan, math.inf])], n=2)
    always = {"reward/nonfinite", "kl_to_prior", "prompts/truncated_fraction"}
    assert set(unrewarded) == always | {"outputs/length", "outputs/ended_fraction"}
    assert unrewarded["reward/nonfinite"] == 2
    # The best of one is no best of two.
    assert rollout_metrics([group("a", [1.0, 2.0]), group("b", [9.0])], n=2)["reward/best_of_n"] == 2.0
