"""Intervals over prompts: of means, of paired differences, and of the difference of two KL-reward frontiers.

Shapes: P prompts, R resamples, K points of the KL axis, C a method's coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES, SEED = 2000, 0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean over prompts and the half width of its 95% interval."""
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Band:
    """The difference of two frontiers where both reach, with a band that holds all of it with 95%.

    Attributes:
        kl_K: nats.
        difference_K, half_K: in units of the reward; ``half_K`` is the band's half width.
    """

    kl_K: np.ndarray
    difference_K: np.ndarray
    half_K: np.ndarray


def frontier_band(
    ours: Sequence[dict[str, list[float]]],
    theirs: Sequence[dict[str, list[float]]],
    prior: list[float],
    points: int = 20,
) -> Band:
    """By a bootstrap over prompts, the same prompts for all runs of both methods.

    Args:
        ours, theirs: a run each coefficient: ``kl`` and ``reward`` of each prompt.
        prior: the prior's reward of each prompt: both frontiers begin there, and are straight between their runs.
    """
    rewards = [np.array([prior, *(run["reward"] for run in runs)]) for runs in (ours, theirs)]
    kls = [np.array([np.zeros(len(prior)), *(run["kl"] for run in runs)]) for runs in (ours, theirs)]
    top = min(kl_CP.mean(1).max() for kl_CP in kls)
    kl_K = np.linspace(0, top, points + 1)[1:]

    def difference(chosen_P: np.ndarray) -> np.ndarray:
        lines = []
        for kl_CP, reward_CP in zip(kls, rewards, strict=True):
            kl_C, reward_C = kl_CP[:, chosen_P].mean(1), reward_CP[:, chosen_P].mean(1)
            order = np.argsort(kl_C)
            lines.append(np.interp(kl_K, kl_C[order], reward_C[order]))
        return lines[0] - lines[1]

    everything = np.arange(len(prior))
    random = np.random.default_rng(SEED)
    found_K = difference(everything)
    resampled_RK = np.array([difference(random.choice(everything, len(everything))) for _ in range(RESAMPLES)])
    deviation_K = resampled_RK.std(0)
    largest_R = np.abs((resampled_RK - found_K) / deviation_K).max(1)
    return Band(kl_K, found_K, float(np.quantile(largest_R, 0.95)) * deviation_K)


def slope(wins: dict[int, list[list[float]]]) -> tuple[float, float]:
    """The slope of the win-rate on log2 n and its half width (95%), clustered by prompt.

    Args:
        wins: by n, each seed's win-rate of each prompt.
    """
    steps = np.log2(list(wins))
    wins_NP = np.array([np.mean(seeds, axis=0) for seeds in wins.values()])
    centred = steps - steps.mean()
    # The slope is linear in the wins: each prompt has one of its own, their mean is the slope.
    slopes_P = centred @ wins_NP / (centred @ centred)
    half = stats.t.ppf(0.975, len(slopes_P) - 1) * slopes_P.std(ddof=1) / math.sqrt(len(slopes_P))
    return float(slopes_P.mean()), float(half)
