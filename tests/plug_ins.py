"""Objectives that are no part of the package, as a user would write them; ``objective._target_`` names them."""

from __future__ import annotations

from nemo_brain.objectives import Brain


class GDCPlusPlus(Brain):
    """GDC++ (arXiv 2206.00761): the mean of a log(a / beta) - a + beta, a = alpha / Z, Z the group's mean of alpha."""

    smallest_group = 1

    def loss(self, inputs, weights):
        log_z_G1 = inputs.mean(weights.log_alpha_GN.exp()).log()[:, None]
        log_a_GN = weights.log_alpha_GN - log_z_G1
        a_GN, beta_GN = log_a_GN.exp(), weights.log_beta_GN.exp()
        return inputs.mean(a_GN * (log_a_GN - weights.log_beta_GN) - a_GN + beta_GN)


class RunningDPG(Brain):
    """DPG (arXiv 1912.08517), -mean of alpha / Z log q, with a running Z over all prompts."""

    smallest_group = 1

    def __init__(self, gamma: float, decay: float = 0.5):
        super().__init__(gamma)
        self.decay, self.z, self.steps = decay, 1.0, 0

    def loss(self, inputs, weights):
        return -inputs.mean(weights.log_alpha_GN.exp() / self.z * inputs.policy_logprobs_GN)

    def update(self, inputs, weights):
        self.z += (1 - self.decay) * (inputs.mean(weights.log_alpha_GN.exp()).mean().item() - self.z)
        self.steps += 1

    def state_dict(self):
        return {"z": self.z, "steps": self.steps}

    def load_state_dict(self, state):
        self.z, self.steps = state["z"], state["steps"]
