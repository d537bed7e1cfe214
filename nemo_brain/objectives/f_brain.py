"""BRAIn with another f-divergence between the self-normalised weights than KL(alpha_hat || beta_hat)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from nemo_brain.objectives.base import LogWeights, ObjectiveInputs, kl_divergence
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.registry import register


def _js(log_alpha_GN: torch.Tensor, log_beta_GN: torch.Tensor) -> torch.Tensor:
    """KL of each from their mean, added: f(t) = t log t - (t + 1) log((t + 1) / 2)."""
    # Where both weights are zero nothing may come of them, in value or gradient.
    either_GN = (log_alpha_GN > -torch.inf) | (log_beta_GN > -torch.inf)
    log_alpha_GN, log_beta_GN = (log_GN.masked_fill(~either_GN, 0.0) for log_GN in (log_alpha_GN, log_beta_GN))
    log_mean_GN = torch.logaddexp(log_alpha_GN, log_beta_GN) - math.log(2)
    log_mean_GN = log_mean_GN.masked_fill(~either_GN, 0.0)
    return kl_divergence(log_alpha_GN.masked_fill(~either_GN, -torch.inf), log_mean_GN) + kl_divergence(
        log_beta_GN.masked_fill(~either_GN, -torch.inf), log_mean_GN
    )


def _total_variation(log_alpha_GN: torch.Tensor, log_beta_GN: torch.Tensor) -> torch.Tensor:
    """f(t) = |t - 1| / 2."""
    return (log_alpha_GN.exp() - log_beta_GN.exp()).abs().sum(-1) / 2


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "kl": kl_divergence,
    "reverse_kl": lambda log_alpha_GN, log_beta_GN: kl_divergence(log_beta_GN, log_alpha_GN),
    "js": _js,
    "tv": _total_variation,
}


@register("f_brain")
class FBrain(Brain):
    """sum_i alpha_hat_i f(t_i), t = beta_hat / alpha_hat; the coefficient of grad log q(y_i|x) is
    beta_hat_i (f'(t_i) - sum_j beta_hat_j f'(t_j)). With ``reverse_kl`` it has the form of EXO's (arXiv:2402.00856).

    Args:
        gamma, goodness, goodness_center: of alpha, as in ``Brain``.
        divergence: ``kl`` (BRAIn's), ``reverse_kl``, ``js`` or ``tv`` (total variation).
    """

    def __init__(
        self,
        gamma: float = 0.1,
        goodness: str = "bradley_terry",
        goodness_center: float = 0.0,
        divergence: str = "kl",
    ):
        super().__init__(gamma, goodness, goodness_center)
        if divergence not in DIVERGENCES:
            raise ValueError(f"unknown objective.divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
        self.divergence = DIVERGENCES[divergence]

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        return self.divergence(weights.log_alpha_hat_GN, weights.log_beta_hat_GN)
