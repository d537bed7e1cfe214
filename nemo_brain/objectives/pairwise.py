"""Contrastive objectives on pairs of a group's outputs, the better one by reward against the worse one.

Shapes: G groups, N outputs per group; [G, N, N] has the better output's place before the worse one's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nemo_brain.objectives.base import LogWeights, Objective, ObjectiveInputs, check_number
from nemo_brain.objectives.dpo_sft import DPOSft
from nemo_brain.objectives.registry import register

PAIRS = ("best_worst", "all")


class Pairwise(DPOSft):
    """The mean over pairs of a loss of beta (s_w - s_l), s = log q - log p. Outputs of equal rewards are no pair; those
    that tie for the best or the worst share that place. The proposal does not enter.

    Args:
        beta: the coefficient of s.
        pairs: ``best_worst`` (one pair of a group) or ``all``.
    """

    def __init__(self, beta: float, pairs: str = "best_worst"):
        super().__init__(beta)
        if pairs not in PAIRS:
            raise ValueError(f"unknown objective.pairs {pairs!r}; known: {', '.join(PAIRS)}")
        self.pairs = pairs

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        return self._over_pairs(inputs, self.pair_loss(_margins(weights.log_beta_GN)))

    def pair_loss(self, margins_GNN: torch.Tensor) -> torch.Tensor:
        """Of pairs whose beta (s_w - s_l) is given, [G, N, N]."""
        raise NotImplementedError

    def _over_pairs(self, inputs: ObjectiveInputs, losses_GNN: torch.Tensor) -> torch.Tensor:
        """The mean over the pairs [G], 0 where there is none."""
        kept_GN, rewards_GN = inputs.kept_GN, inputs.rewards_GN
        pairs_GNN = (_margins(rewards_GN) > 0) & kept_GN[:, :, None] & kept_GN[:, None, :]
        if self.pairs == "best_worst":
            best_GN = rewards_GN == rewards_GN.masked_fill(~kept_GN, -torch.inf).amax(-1, keepdim=True)
            worst_GN = rewards_GN == rewards_GN.masked_fill(~kept_GN, torch.inf).amin(-1, keepdim=True)
            pairs_GNN &= best_GN[:, :, None] & worst_GN[:, None, :]
        losses_G = losses_GNN.masked_fill(~pairs_GNN, 0.0).sum((-1, -2))
        return losses_G / pairs_GNN.sum((-1, -2)).clamp(min=1)


@register("dpo")
class DPO(Pairwise):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290): -log sigmoid(beta (s_w - s_l)).

    On samples of the prior it is offline DPO, on those of a refreshed proposal online DPO (arXiv:2402.04792).
    """

    def pair_loss(self, margins_GNN: torch.Tensor) -> torch.Tensor:
        return -F.logsigmoid(margins_GNN)


@register("ipo")
class IPO(Pairwise):
    """IPO (Azar et al. 2023, arXiv:2310.12036): (s_w - s_l - 1 / (2 beta))^2, of whole outputs' log-probs."""

    def pair_loss(self, margins_GNN: torch.Tensor) -> torch.Tensor:
        return ((margins_GNN - 0.5) / self.beta).square()


@register("hinge")
class Hinge(Pairwise):
    """SLiC-norm, RSO's hinge (Liu et al. 2023, arXiv:2309.06657): max(0, 1 - beta (s_w - s_l)), over all pairs."""

    def __init__(self, beta: float, pairs: str = "all"):
        super().__init__(beta, pairs)

    def pair_loss(self, margins_GNN: torch.Tensor) -> torch.Tensor:
        return (1 - margins_GNN).clamp(min=0.0)


@register("slic")
class SLiC(Pairwise):
    """SLiC (Zhao et al. 2023, arXiv:2305.10425): max(0, delta - (log q_w - log q_l)) - regulariser log q_best.

    The paper regularises towards a reference answer or towards the best candidate; a group has the latter.

    Args:
        delta: the margin, in nats.
        regulariser: the coefficient of the best output's log-prob; outputs that tie for the best share it.
        pairs: as in ``Pairwise``.
    """

    def __init__(self, delta: float = 1.0, regulariser: float = 0.0, pairs: str = "best_worst"):
        super().__init__(1.0, pairs)
        check_number("delta", delta, positive=True)
        check_number("regulariser", regulariser)
        if regulariser < 0:
            raise ValueError(f"objective.regulariser is {regulariser!r}; it must not be negative")
        self.delta, self.regulariser = delta, regulariser

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        logprobs_GN = inputs.policy_logprobs_GN
        losses_G = self._over_pairs(inputs, (self.delta - _margins(logprobs_GN)).clamp(min=0.0))
        return losses_G - self.regulariser * (weights.log_alpha_hat_GN.exp() * logprobs_GN).sum(-1)


@register("rpo")
class RPO(Objective):
    """RPO (Sun et al. 2025, arXiv:2502.00203): the difference beta (s_i - s_j) of a pair is to be eta (r_i - r_j), over
    all pairs.

    ``bwd_kl`` is KL(sigmoid(eta dr) || sigmoid(beta ds)), ``fwd_kl`` the other direction, ``sq`` the squared error.

    Args:
        beta: the coefficient of s = log q - log p.
        eta: the reward's scale.
        variant: ``bwd_kl``, ``fwd_kl`` or ``sq``.
    """

    def __init__(self, beta: float, eta: float, variant: str = "bwd_kl"):
        check_number("beta", beta, positive=True)
        check_number("eta", eta, positive=True)
        variants = {"bwd_kl": _backward_kl, "fwd_kl": _forward_kl, "sq": lambda x, y: (x - y).square()}
        if variant not in variants:
            raise ValueError(f"unknown objective.variant {variant!r}; known: {', '.join(variants)}")
        self.beta, self.eta, self.distance = beta, eta, variants[variant]

    def log_alpha(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self.eta * inputs.rewards_GN

    def log_beta(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self.beta * (inputs.policy_logprobs_GN - inputs.prior_logprobs_GN)

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        kept_GN = inputs.kept_GN
        pairs_GNN = (kept_GN[:, :, None] & kept_GN[:, None, :]).triu(diagonal=1)
        losses_GNN = self.distance(_margins(weights.log_alpha_GN), _margins(weights.log_beta_GN))
        return losses_GNN.masked_fill(~pairs_GNN, 0.0).sum((-1, -2)) / pairs_GNN.sum((-1, -2))


def _margins(values_GN: torch.Tensor) -> torch.Tensor:
    """Each output's value less each other's [G, N, N]."""
    return values_GN[:, :, None] - values_GN[:, None, :]


def _backward_kl(wanted_GNN: torch.Tensor, margins_GNN: torch.Tensor) -> torch.Tensor:
    """KL of Bernoulli laws with log-odds ``wanted_GNN`` from those with log-odds ``margins_GNN``."""
    above_GNN = F.logsigmoid(wanted_GNN) - F.logsigmoid(margins_GNN)
    below_GNN = F.logsigmoid(-wanted_GNN) - F.logsigmoid(-margins_GNN)
    return wanted_GNN.sigmoid() * above_GNN + (-wanted_GNN).sigmoid() * below_GNN


def _forward_kl(wanted_GNN: torch.Tensor, margins_GNN: torch.Tensor) -> torch.Tensor:
    return _backward_kl(margins_GNN, wanted_GNN)
