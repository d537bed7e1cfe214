"""How well rewards predict preferences: accuracy with its interval, log-loss, and calibration.

P pairs; a pair's probability is p = sigmoid(r_chosen - r_rejected), what a Bradley-Terry model says about the choice
that was made. Calibration is about confidence: of the pairs on which the model says max(p, 1 - p) it should be right
as often as that.
"""

from __future__ import annotations

import numpy as np

from nemo_brain.report.evaluate import win_rate_interval, win_score

BINS = 5  # of the confidence, which lies in [0.5, 1]


def preference_metrics(rewards_P2: np.ndarray) -> dict:
    """Metrics of rewards [P, 2] (chosen, rejected) of at least one pair, by the names of an eval record.

    A tie counts half. The accuracy has a 95% Wilson score interval over pairs; ``eval/log_loss`` is in nats, log 2 for
    a coin; ``eval/reliability`` lists bins of confidence: ``low``, ``high``, ``pairs``, ``confidence`` (mean),
    ``accuracy``; ``eval/calibration_error`` is the mean over pairs of their bin's |confidence - accuracy|.
    """
    gap_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    score_P = np.array([win_score([chosen], [rejected]) for chosen, rejected in rewards_P2])
    bins = reliability(gap_P, score_P)
    return {
        **win_rate_interval(score_P).as_metrics("eval/accuracy"),
        "eval/log_loss": float(np.mean(np.logaddexp(0.0, -gap_P))),
        "eval/calibration_error": sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(gap_P),
        "eval/reliability": bins,
        "eval/reward": float(np.mean(rewards_P2)),
        "eval/reward_std": float(np.std(rewards_P2)),
        "eval/chosen_reward": float(np.mean(rewards_P2[:, 0])),
        "eval/rejected_reward": float(np.mean(rewards_P2[:, 1])),
        "eval/pairs": len(gap_P),
    }


def reliability(gap_P: np.ndarray, score_P: np.ndarray) -> list[dict[str, float]]:
    """The bins of the confidence that hold a pair."""
    confidence_P = 1 / (1 + np.exp(-np.abs(gap_P)))
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {
            "low": 0.5 + index / (2 * BINS),
            "high": 0.5 + (index + 1) / (2 * BINS),
            "pairs": int(np.sum(bin_P == index)),
            "confidence": float(np.mean(confidence_P[bin_P == index])),
            "accuracy": float(np.mean(score_P[bin_P == index])),
        }
        for index in range(BINS)
        if np.any(bin_P == index)
    ]
