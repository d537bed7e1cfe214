"""BRAIn's objective (Pandey et al., ICML 2024)."""

from __future__ import annotations

import torch

from nemo_brain.objectives.base import Objective, ObjectiveInputs, check_number
from nemo_brain.objectives.goodness import GOODNESS
from nemo_brain.objectives.registry import register


@register("brain")
class Brain(Objective):
    """BRAIn: alpha_i = p(y_i|x) p(G=1|y_i,x) / q'(y_i|x), beta_i = q(y_i|x) / q'(y_i|x).

    The loss is KL(alpha_hat || beta_hat), whose gradient is - sum_i (alpha_hat_i - beta_hat_i) grad log q(y_i|x).

    Args:
        gamma: reward temperature, in units of the reward; with Bradley-Terry goodness it is PPO's KL coefficient.
        goodness: a key of ``GOODNESS``.
        goodness_center: the reward at which a sigmoid gives 1/2; it cancels in Bradley-Terry's odds.
    """

    def __init__(self, gamma: float = 0.1, goodness: str = "bradley_terry", goodness_center: float = 0.0):
        check_number("gamma", gamma, positive=True)
        check_number("goodness_center", goodness_center)
        if goodness not in tuple(GOODNESS):
            raise ValueError(f"unknown objective.goodness {goodness!r}; known: {', '.join(sorted(GOODNESS))}")
        self.gamma = gamma
        self.goodness = GOODNESS[goodness]
        self.goodness_center = goodness_center

    def log_alpha(self, inputs: ObjectiveInputs) -> torch.Tensor:
        log_goodness_GN = self.goodness((inputs.rewards_GN - self.goodness_center) / self.gamma)
        return inputs.prior_logprobs_GN + log_goodness_GN - inputs.proposal_logprobs_GN
