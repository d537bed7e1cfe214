"""The gamma and the centre with which a reward is a probability, by preference pairs: of two outputs the first is
preferred with sigmoid((r_1 - r_2) / gamma) (Bradley-Terry), one is good with sigmoid((r - centre) / gamma).

P pairs. The likelihood's maximum is one in 1 / gamma, in which its logarithm is concave. It lies at gamma = 0 where the
reward orders all pairs as the data do, and at none where the chosen outputs have no higher rewards on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

RESAMPLES = 500  # of all pairs, with replacement
_LIKELIHOOD = 1.92  # by so many nats it falls at the ends of a 95% interval: half of chi-square's quantile


@dataclass(frozen=True)
class Calibration:
    """What fits best, with a 95% interval of gamma. ``separable``: any gamma up to ``gamma``, the interval's upper end,
    would do, and the smaller the likelier."""

    gamma: float
    low: float
    high: float
    center: float
    separable: bool


def calibrate(rewards_P2: np.ndarray, seed: int = 0) -> Calibration:
    """Fits rewards [P, 2] (chosen, rejected), float64 and finite.

    The interval is one over pairs drawn anew (percentiles of RESAMPLES draws), the centre where the answers are good
    with 1/2 on average.

    Raises:
        ValueError: no gamma fits; says why.
    """
    gap_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    if not rewards_P2.size:
        raise ValueError("there are no pairs")
    if np.ptp(rewards_P2) == 0:
        raise ValueError(f"all rewards are {rewards_P2[0, 0]:g}")
    if not gap_P.any():
        raise ValueError("chosen and rejected have equal rewards in every pair")
    gamma = _fit(gap_P)
    if math.isinf(gamma):
        raise ValueError(
            f"the chosen outputs' rewards are not above the rejected ones' on average ({gap_P.mean():+.3g})"
        )
    if separable := gamma == 0:
        if len(gap_P) * math.log(2) <= _LIKELIHOOD:
            raise ValueError(f"{len(gap_P)} pairs that the reward orders as they are say nothing of gamma")
        low, high = 0.0, _upper_end(gap_P[gap_P > 0])
        gamma = high
    else:
        draws = np.random.default_rng(seed)
        fits = [_fit(gap_P[draws.integers(len(gap_P), size=len(gap_P))]) for _ in range(RESAMPLES)]
        low, high = np.quantile(fits, [0.025, 0.975], method="nearest").tolist()
    return Calibration(gamma, low, high, _center(rewards_P2.ravel(), gamma), separable)


def _fit(gap_P: np.ndarray) -> float:
    """The likeliest gamma: 0 where no pair is in the wrong order, infinite where the mean gap is not above 0."""
    if gap_P.mean() <= 0:
        return math.inf
    if gap_P.min() >= 0:
        return 0.0
    scale = np.abs(gap_P).max()
    scaled_P = gap_P / scale

    def slope(inverse: float) -> float:
        return float((scaled_P * expit(-inverse * scaled_P)).mean())

    upper = 1.0
    while slope(upper) > 0:
        upper *= 2
    return float(scale / brentq(slope, 0.0, upper, xtol=1e-12 * upper, rtol=1e-12))


def _upper_end(gap_P: np.ndarray) -> float:
    """The gamma at which the log-likelihood of pairs in the right order is _LIKELIHOOD below its supremum, 0."""

    def fall(log_gamma: float) -> float:
        return float(np.logaddexp(0, -gap_P / math.exp(log_gamma)).sum()) - _LIKELIHOOD

    # A pair's part is between 0 and log 2: with gammas far from all gaps the sum is at its ends.
    low, high = math.log(gap_P.min()) - 10, math.log(gap_P.max()) + 10
    return math.exp(brentq(fall, low, high))


def _center(rewards: np.ndarray, gamma: float) -> float:
    """Where sigmoid((r - centre) / gamma) is 1/2 on average."""
    low, high = rewards.min(), rewards.max()
    return float(brentq(lambda center: expit((rewards - center) / gamma).mean() - 0.5, low, high))
