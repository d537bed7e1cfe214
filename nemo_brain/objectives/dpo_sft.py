"""DPO-sft: DPO on outputs of the start model that a reward has ranked."""

from __future__ import annotations

import torch

from nemo_brain.objectives.base import Objective, ObjectiveInputs, check_number
from nemo_brain.objectives.registry import register


@register("dpo_sft")
class DPOSft(Objective):
    """DPO-sft: the output of the largest reward against the others, with log beta_i = beta (log q - log p).

    With two outputs the loss is DPO's, -log sigmoid(beta [(log q_w - log p_w) - (log q_l - log p_l)]); with more, the
    same softmax over all of them. Outputs that tie for the largest reward share the target evenly, which is the limit
    of softmax(r / gamma) and does not depend on the outputs' order: a pair of equal rewards pulls q back to p.
    The proposal is the prior, so ``proposal_logprobs_GN`` is not used.
    """

    def __init__(self, beta: float):
        check_number("beta", beta, positive=True)
        self.beta = beta

    def log_alpha(self, inputs: ObjectiveInputs) -> torch.Tensor:
        rewards_GN = inputs.rewards_GN.masked_fill(~inputs.kept_GN, -torch.inf)
        best_GN = rewards_GN == rewards_GN.amax(-1, keepdim=True)
        return torch.zeros_like(rewards_GN).masked_fill(~best_GN, -torch.inf)

    def log_beta(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self.beta * (inputs.policy_logprobs_GN - inputs.prior_logprobs_GN)
