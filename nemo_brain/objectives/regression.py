"""Regressions of log-ratios on rewards: the spread of their difference within a group is to vanish."""

from __future__ import annotations

import torch

from nemo_brain.objectives.base import LogWeights, Objective, ObjectiveInputs, check_number
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.registry import register


@register("log_variance")
class LogVariance(Brain):
    """Log-variance divergence, GVPO (arXiv:2504.19599): half the variance over the group of log q - log p - log p(G=1).

    Args: as in ``Brain``, whose optimum it shares.
    """

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        return _spread(inputs, weights.log_beta_GN - weights.log_alpha_GN) / 2


@register("rebel")
class REBEL(Objective):
    """REBEL (Gao et al. 2024, arXiv:2404.16767): the mean over pairs of (dw - eta dr)^2, w = log q - log q'.

    Each iteration's optimum is q' exp(eta r), normalised: a step of mirror descent on the reward, without a prior.

    Args:
        eta: the reward's scale.
    """

    def __init__(self, eta: float):
        check_number("eta", eta, positive=True)
        self.eta = eta

    def log_alpha(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self.eta * inputs.rewards_GN

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        return 2 * _spread(inputs, weights.log_beta_GN - weights.log_alpha_GN)


def _spread(inputs: ObjectiveInputs, values_GN: torch.Tensor) -> torch.Tensor:
    """The unbiased variance over the outputs that count [G]; a pair's squared difference is twice that on average."""
    centred_GN = (values_GN - inputs.mean(values_GN)[:, None]).masked_fill(~inputs.kept_GN, 0.0)
    return centred_GN.square().sum(-1) / (inputs.kept_GN.sum(-1) - 1)
