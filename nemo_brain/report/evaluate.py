"""Statistics of scored outputs: how a held-out set changed against the start model, and what a rollout looked like.

The prompt is the unit: the outputs of a prompt are averaged first, then intervals and tests run over prompts, because
outputs of one prompt are not independent draws of the question that is asked ("how will it do on another prompt?").

- Means carry a 95% Student t interval over prompts.
- The win-rate carries a 95% Wilson score interval (Wilson 1927; Brown, Cai & DasGupta 2001) with one trial per prompt.
  A prompt's score lies in [0, 1], so its variance is at most p (1 - p), that of a Bernoulli trial: with ties or several
  pairs per prompt the interval errs on the wide side. Unlike a bootstrap it stays honest where few prompts all agree
  (10 wins of 10 give [0.72, 1], not [1, 1]).
- The change in reward is paired by prompt: two-sided paired t-test, and Wilcoxon's signed-rank test beside it, which
  asks nothing of the rewards' distribution.

What cannot be computed (the spread of one prompt, a test of differences without spread) is NaN, null in metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from nemo_brain.core.groups import ScoredGroup

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with the bounds of its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def as_metrics(self, name: str) -> dict[str, float]:
        return {name: self.mean, f"{name}_ci_low": self.low, f"{name}_ci_high": self.high}


@dataclass(frozen=True)
class Evaluation:
    """The current model against the start model on the same held-out prompts.

    ``kl_to_prior`` is in nats per output. ``p_value`` is the paired t-test's;
    ``win_rate`` counts a tie as half; ``nonfinite`` are the current model's outputs without a finite reward.
    ``reference_reward`` is None without reference answers.
    """

    prompts: int
    reward: Estimate
    start_reward: Estimate
    reward_difference: Estimate
    p_value: float
    p_value_wilcoxon: float
    win_rate: Estimate
    kl_to_prior: Estimate
    nonfinite: int = 0
    reference_reward: float | None = None

    def as_metrics(self) -> dict[str, float]:
        """The stable metric names of an eval record; the NaNs among them become null in metrics.jsonl."""
        metrics = {
            **self.reward.as_metrics("eval/reward"),
            **self.win_rate.as_metrics("eval/win_rate"),
            **self.kl_to_prior.as_metrics("eval/kl_to_prior"),
            "eval/start_reward": self.start_reward.mean,
            **self.reward_difference.as_metrics("eval/reward_difference"),
            "eval/p_value": self.p_value,
            "eval/p_value_wilcoxon": self.p_value_wilcoxon,
            "eval/prompts": self.prompts,
            "eval/nonfinite": self.nonfinite,
        }
        if self.reference_reward is not None:
            metrics["eval/reference_reward"] = self.reference_reward
        return metrics


def evaluate(
    start: Sequence[ScoredGroup],
    current: Sequence[ScoredGroup],
    reference_rewards: Sequence[float | None] | None = None,
) -> Evaluation:
    """Compares the current model's held-out outputs with the start model's.

    Args:
        start, current: the same prompts in the same order; the numbers of outputs may differ. Outputs whose reward is
            not finite are left out, and prompts for which one side has no other. ``current`` gives the KL estimate: the
            mean of log q - log p over the policy's own outputs, unbiased for KL(q || p) if they were sampled at
            temperature 1.
        reference_rewards: the reward of each prompt's reference answer, None where it has none.

    Raises:
        ValueError: no prompts, different prompts, or no prompt with finite rewards.
    """
    if not current or [group.prompt.id for group in start] != [group.prompt.id for group in current]:
        raise ValueError(
            "evaluate needs the same held-out prompts, at least one, in the same order for both models; "
            f"got {len(start)} and {len(current)} groups"
        )
    pairs = [(_finite_rewards(old), _finite_rewards(new)) for old, new in zip(start, current, strict=True)]
    pairs = [(old, new) for old, new in pairs if old and new]
    if not pairs:
        raise ValueError(
            "for no held-out prompt does the reward give the start model's and the current model's outputs a finite "
            "number (correct it)"
        )
    before, after = zip(*pairs, strict=True)
    start_G, reward_G = _means(before), _means(after)
    difference_G = reward_G - start_G
    p_value, p_value_wilcoxon = paired_tests(difference_G)
    kl_G = _means([_log_ratios(group) for group in current])
    references = [r for r in reference_rewards or [] if r is not None and math.isfinite(r)]
    return Evaluation(
        prompts=len(pairs),
        nonfinite=_nonfinite(current),
        reward=mean_interval(reward_G),
        start_reward=mean_interval(start_G),
        reward_difference=mean_interval(difference_G),
        p_value=p_value,
        p_value_wilcoxon=p_value_wilcoxon,
        win_rate=win_rate_interval(np.array([win_score(a, b) for a, b in zip(after, before, strict=True)])),
        kl_to_prior=mean_interval(kl_G),
        reference_reward=float(np.mean(references)) if references else None,
    )


def gold_metrics(
    name: str, start: Sequence[ScoredGroup], current: Sequence[ScoredGroup], gold: Sequence[ScoredGroup]
) -> dict[str, float]:
    """What another judge says of the same outputs: ``gold/NAME/...``, and its correlation with the training's reward.

    Args:
        start, gold: the start model's and the current model's outputs with its rewards.
        current: the latter with the training's.
    """
    found = evaluate(start, gold)
    metrics = {
        **found.reward.as_metrics(f"gold/{name}/reward"),
        f"gold/{name}/start_reward": found.start_reward.mean,
        **found.reward_difference.as_metrics(f"gold/{name}/reward_difference"),
        **found.win_rate.as_metrics(f"gold/{name}/win_rate"),
    }
    pairs = np.array(
        [pair for a, b in zip(current, gold, strict=True) for pair in zip(a.rewards, b.rewards, strict=True)]
    )
    pairs = pairs[np.isfinite(pairs).all(-1)]
    spread = len(pairs) > 1 and (pairs.std(0) > 0).all()
    return {**metrics, f"gold/{name}/correlation": float(np.corrcoef(pairs.T)[0, 1]) if spread else math.nan}


def rollout_metrics(
    groups: Sequence[ScoredGroup], n: int, proposal_gap: float | None = None, of_prior: bool = False
) -> dict[str, float]:
    """The iteration metrics of a rollout.

    ``reward/mean`` and ``reward/std`` run over all outputs with a finite reward, the others are counted in
    ``reward/nonfinite``; ``reward/best_of_n`` is the mean over prompts of the highest reward, of the groups with n
    finite ones (the best of fewer would not be comparable). ``kl_to_prior`` is the mean over outputs of log q -
    log p in nats, without importance weights: it estimates KL(q' || p) for sampling temperature 1, and is only
    an indication at another. ``prompts/truncated_fraction`` were cut to ``data.max_prompt_tokens``;
    ``outputs/length`` is in tokens.

    Args:
        n: the outputs per prompt that were asked for.
        proposal_gap: mean over outputs of |log q' as rescored by the training kernels - log q' as sampled| in nats,
            None if nothing was rescored.
        of_prior: the outputs are the prior's own, from which ``kl_from_prior`` estimates KL(p || q) instead.
    """
    outputs = [output for group in groups for output in group.outputs]
    rewards_by_group = [_finite_rewards(group) for group in groups]
    rewards = [reward for rewards in rewards_by_group for reward in rewards]
    best = [max(rewards) for rewards in rewards_by_group if len(rewards) >= n]
    metrics: dict[str, Any] = {"reward/nonfinite": _nonfinite(groups)}
    if rewards:
        metrics |= {"reward/mean": np.mean(rewards), "reward/std": np.std(rewards)}
    if best:
        metrics["reward/best_of_n"] = np.mean(best)
    ratio = np.mean([ratio for group in groups for ratio in _log_ratios(group)])
    metrics |= {"kl_from_prior": -ratio} if of_prior else {"kl_to_prior": ratio}
    if proposal_gap is not None:
        metrics["proposal_gap"] = proposal_gap
    metrics["prompts/truncated_fraction"] = np.mean([group.prompt.truncated for group in groups])
    metrics["outputs/length"] = np.mean([len(output.token_ids) for output in outputs])
    metrics["outputs/ended_fraction"] = np.mean([output.ended for output in outputs])
    return {name: float(value) for name, value in metrics.items()}


def staleness_metrics(groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
    """How far behind the policy after ``step`` optimizer steps the weights were that sampled, on average over outputs:
    ``ahead/steps``, those between it and the weights that began an output, and ``ahead/kl``, log q' - log q in nats,
    which estimates KL(q' || q) for sampling temperature 1."""
    steps = [step - begun for group in groups for begun in group.policy_steps or ()]
    pairs = [zip(group.proposal_logprobs, group.policy_logprobs, strict=True) for group in groups]
    gaps = [theirs - ours for pair in pairs for theirs, ours in pair]
    return {"ahead/steps": float(np.mean(steps)), "ahead/kl": float(np.mean(gaps))}


def mean_interval(values_G: np.ndarray) -> Estimate:
    """The mean of one value per prompt with its t interval; NaN bounds below two prompts, a NaN mean for none."""
    count = len(values_G)
    if count < 2:
        return Estimate(float(values_G[0]) if count else math.nan, math.nan, math.nan)
    mean = float(np.mean(values_G))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values_G, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half)


def win_score(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The share of pairs (any output of ours, any of theirs) that we win by reward, ties counting half: in [0, 1]."""
    gap = np.subtract.outer(np.asarray(ours), np.asarray(theirs))
    return float(np.mean(0.5 * (1 + np.sign(gap))))


def win_rate_interval(scores_G: np.ndarray) -> Estimate:
    """The mean of one win score in [0, 1] per prompt with its Wilson score interval; see the top of this file."""
    count, rate = len(scores_G), float(np.mean(scores_G))
    z2 = stats.norm.ppf((1 + CONFIDENCE) / 2) ** 2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Estimate(rate, float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def paired_tests(difference_G: np.ndarray) -> tuple[float, float]:
    """Two-sided p-values of the paired t-test and of Wilcoxon's signed-rank test against a difference of zero.

    Both are NaN below two prompts or if no prompt changed; the t-test also where all differences are equal, since they
    then say nothing about their own spread.
    """
    scale = np.max(np.abs(difference_G))
    if len(difference_G) < 2 or scale == 0:
        return math.nan, math.nan
    # Equal differences of rounded rewards differ in their last bits.
    spread = np.std(difference_G, ddof=1) > 1e-12 * scale
    p_value = float(stats.ttest_1samp(difference_G, 0.0).pvalue) if spread else math.nan
    return p_value, float(stats.wilcoxon(difference_G).pvalue)


def _log_ratios(group: ScoredGroup) -> list[float]:
    """log q - log p of each output, in nats."""
    return [q - p for q, p in zip(group.policy_logprobs, group.prior_logprobs, strict=True)]


def _finite_rewards(group: ScoredGroup) -> list[float]:
    return [reward for reward in group.rewards if math.isfinite(reward)]


def _nonfinite(groups: Sequence[ScoredGroup]) -> int:
    """The number of outputs whose reward is not finite."""
    return sum(not math.isfinite(reward) for group in groups for reward in group.rewards)


def _means(values: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([np.mean(v) for v in values])
