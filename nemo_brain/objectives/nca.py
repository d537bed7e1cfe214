"""Noise-contrastive alignment with explicit rewards (Chen et al. 2024, arXiv:2402.05369): samples of the prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nemo_brain.objectives.base import LogWeights, Objective, ObjectiveInputs, check_number
from nemo_brain.objectives.registry import register


@register("infonca")
class InfoNCA(Objective):
    """-sum_i label_i log softmax_i(beta s), label = softmax(r / tau), s = log q - log p. The proposal is the prior.

    Args:
        tau: temperature of the reward.
        beta: the coefficient of s.
    """

    def __init__(self, tau: float, beta: float):
        check_number("tau", tau, positive=True)
        check_number("beta", beta, positive=True)
        self.tau, self.beta = tau, beta

    def log_alpha(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return inputs.rewards_GN / self.tau

    def log_beta(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self.beta * (inputs.policy_logprobs_GN - inputs.prior_logprobs_GN)

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        label_GN = weights.log_alpha_hat_GN.exp()
        return -(label_GN * weights.log_beta_hat_GN.masked_fill(~inputs.kept_GN, 0.0)).sum(-1)


@register("nca")
class NCA(InfoNCA):
    """-sum_i label_i log sigmoid(beta s_i) - (1/n) sum_i log sigmoid(-beta s_i): each output's likelihood by itself, so
    that the best one's does not fall."""

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        label_GN, log_beta_GN = weights.log_alpha_hat_GN.exp(), weights.log_beta_GN
        return -(label_GN * F.logsigmoid(log_beta_GN)).sum(-1) - inputs.mean(F.logsigmoid(-log_beta_GN))
