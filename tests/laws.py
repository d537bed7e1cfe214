"""Statistical comparison of samples with the law that they should follow."""

from __future__ import annotations

import numpy as np
from scipy import stats

SIGNIFICANT = 1e-4  # of a statistical test; seeds are fixed, so a test that passes once passes always


def chi_square(tokens: np.ndarray, probs: np.ndarray) -> float:
    """The p-value of the tokens' (or sequences') counts; those expected fewer than five times are taken together."""
    counts, expected = np.bincount(tokens, minlength=len(probs)).astype(float), len(tokens) * probs / probs.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert not counts[~keep].any()
    return stats.chisquare(counts[keep], expected[keep]).pvalue
