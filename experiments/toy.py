"""The variance toy: posterior N(0, 1), policy N(1, 1), proposal N(mu, 1); the gradient is that of the policy's mean.

The estimates come from the package's objectives; DPG's and GDC++'s variances have closed forms. Signs are those of a
step: the true gradient is -1. Shapes: G groups, N outputs per group.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch

from nemo_brain.objectives import Objective, make_objective

METHODS = ("dpg", "gdc++", "brain", "snis")
TRUE_GRADIENT = -1.0


def exact_variance(method: str, mu: float, n: int) -> float:
    """Of DPG and GDC++ with the known Z, by Gaussian integrals of the squared weights times (y - 1)^2."""
    target = math.exp(mu**2) * (1 + (mu + 1) ** 2)  # posterior^2 / proposal: N(-mu, 1), scaled
    mixed = math.exp(mu**2 - mu) * (1 + mu**2)  # posterior policy / proposal: N(1 - mu, 1), scaled
    policy = math.exp((1 - mu) ** 2) * (1 + (1 - mu) ** 2)  # policy^2 / proposal: N(2 - mu, 1), scaled
    square = target if method == "dpg" else target - 2 * mixed + policy
    return (square - TRUE_GRADIENT**2) / n


def measure(mu: float, n: int, groups: int, seed: int) -> dict[str, dict[str, float]]:
    """Each method's mean, variance (with standard errors), bias, signal-to-noise and mean squared error."""
    generator = torch.Generator().manual_seed(seed)
    outputs_GN = mu + torch.randn(groups, n, generator=generator, dtype=torch.float64)
    found = {}
    for method in METHODS:
        out = _objective(method)(
            _log_normal(outputs_GN, 1.0),
            prior_logprobs_GN=_log_normal(outputs_GN, 0.0),  # the posterior: its reward is 0
            proposal_logprobs_GN=_log_normal(outputs_GN, mu),
            rewards_GN=torch.zeros_like(outputs_GN),
            prompt_ids=["x"] * groups,
        )
        found[method] = summary(-(out.coefficients_GN * (outputs_GN - 1)).sum(-1))
    return found


def summary(estimates_G: torch.Tensor) -> dict[str, float]:
    """What repeated estimates of the one gradient show."""
    count, mean, variance = len(estimates_G), float(estimates_G.mean()), float(estimates_G.var())
    fourth = float((estimates_G - mean).pow(4).mean())
    return {
        "mean": mean,
        "mean_error": (variance / count) ** 0.5,
        "variance": variance,
        "variance_error": ((fourth - variance**2) / count) ** 0.5,
        "bias": mean - TRUE_GRADIENT,
        "signal_to_noise": mean**2 / variance,
        "squared_error": (mean - TRUE_GRADIENT) ** 2 + variance,
    }


def _objective(method: str) -> Objective:
    if method not in ("dpg", "gdc++"):
        return make_objective(method, gamma=1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log_z.json"
        path.write_text(json.dumps({"x": 0.0}), encoding="utf-8")
        return make_objective(method, gamma=1.0, z="known", log_z=str(path))


def _log_normal(values: torch.Tensor, mean: float) -> torch.Tensor:
    return -0.5 * (values - mean).square() - 0.5 * math.log(2 * math.pi)
