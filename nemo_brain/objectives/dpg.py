"""Distributional policy gradients: towards the target by its importance weights.

DPG (Parshakova et al. 2019, arXiv:1912.08517) and GDC (Khalifa et al. 2021, arXiv:2012.11635) have the same gradient;
GDC also adapts its proposal (``rollout.refresh``). GDC++ (Korbak et al. 2022, arXiv:2206.00761) subtracts a baseline.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_brain.objectives.base import LogWeights, ObjectiveInputs
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.normaliser import Normaliser, capped_exp
from nemo_brain.objectives.registry import register


@register("gdc")
@register("dpg")
class DPG(Brain):
    """DPG, GDC: the loss is -(1/n) sum_i a_i log q(y_i|x), a = alpha / Z: cross-entropy with the target.

    Args:
        gamma, goodness, goodness_center: of alpha, as in ``Brain``.
        z, log_z: see ``Normaliser``. With ``group`` it is the self-normalised ``snis``.
    """

    smallest_group = 1

    def __init__(
        self,
        gamma: float = 0.1,
        goodness: str = "bradley_terry",
        goodness_center: float = 0.0,
        z: str = "group",
        log_z: str | None = None,
    ):
        super().__init__(gamma, goodness, goodness_center)
        self.normaliser = Normaliser(z, log_z)

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        return -inputs.mean(capped_exp(self._log_a(inputs, weights)) * inputs.policy_logprobs_GN)

    def update(self, inputs: ObjectiveInputs, weights: LogWeights) -> None:
        self.normaliser.update(inputs, weights.log_alpha_GN)

    def state_dict(self) -> dict[str, Any]:
        return self.normaliser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.normaliser.load_state_dict(state)

    def _log_a(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        """log(alpha / Z) [G, N]."""
        return weights.log_alpha_GN - self.normaliser.log_z(inputs, weights.log_alpha_GN)[:, None]


@register("gdc++")
class GDCPlusPlus(DPG):
    """GDC++: the gradient is -(1/n) sum_i (a_i - beta_i) grad log q(y_i|x), of the generalised KL of a from beta."""

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        log_a_GN, log_beta_GN = self._log_a(inputs, weights), weights.log_beta_GN
        a_GN = capped_exp(log_a_GN)
        return inputs.mean(a_GN * (log_a_GN - log_beta_GN) - a_GN + capped_exp(log_beta_GN))


@register("snis")
class SNIS(Brain):
    """Self-normalised DPG, BRAIn without its baseline: -sum_i alpha_hat_i log q(y_i|x)."""

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        alpha_GN = weights.log_alpha_hat_GN.exp()
        return -(alpha_GN * inputs.policy_logprobs_GN).sum(-1)
