"""RLOO with PPO's clip: KL-regularised policy gradient on whole outputs (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

import torch

from nemo_brain.objectives.base import LogWeights, ObjectiveInputs, check_number
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.normaliser import capped_exp
from nemo_brain.objectives.registry import register


@register("rloo")
class RLOO(Brain):
    """-(1/n) sum_i min(beta_i A_i, clip(beta_i) A_i), A_i = R_i less the mean of the others', R = r + gamma (log p -
    log q'), beta = q / q'. A sequence-level PPO without a critic; token-level PPO is no objective on groups.

    Args:
        gamma: the coefficient of the KL to the prior, in units of the reward.
        clip: beta is clipped to 1 - clip ... 1 + clip; 0: not at all.
    """

    def __init__(self, gamma: float = 0.1, clip: float = 0.2):
        super().__init__(gamma)
        check_number("clip", clip)
        if not 0 <= clip < 1:
            raise ValueError(f"objective.clip is {clip!r}; it must be at least 0 and below 1")
        self.clip = clip

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        # gamma log alpha = r + gamma (log p - log q'): the reward less its share of the KL.
        returns_GN = self.gamma * weights.log_alpha_GN
        count_G1 = inputs.kept_GN.sum(-1, keepdim=True)
        advantages_GN = (returns_GN - inputs.mean(returns_GN)[:, None]) * count_G1 / (count_G1 - 1)
        gained_GN = capped_exp(weights.log_beta_GN) * advantages_GN
        if self.clip:
            clipped_GN = weights.log_beta_GN.exp().clamp(1 - self.clip, 1 + self.clip) * advantages_GN
            gained_GN = torch.minimum(gained_GN, clipped_GN)
        return -inputs.mean(gained_GN)
