"""Objectives on groups of outputs: importance weights, losses and their registry.

An objective sees the sequence log-probs of a group and nothing else, so its gradient with respect to them is a tiny
matrix of coefficients, which the trainer can apply in one pass or in two.

Shapes: G groups (prompts), N outputs per group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

OBJECTIVES: dict[str, type[Objective]] = {}
# log p(G=1 | y, x), up to a constant within a group, as a function of (r - center) / gamma
GOODNESS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

# Coefficients below this are rounding: log-probs of 1e4 nats carry 2e-12 each in float64, an output a few of them.
ZERO_COEFFICIENT = 1e-10


def register(name: str, registry: dict = OBJECTIVES):
    """Registers an objective class under ``name``, or with ``registry=GOODNESS`` a goodness model."""

    def add(item):
        if name in registry:
            raise ValueError(f"{name!r} is already registered")
        registry[name] = item
        return item

    return add


def make_objective(name: str, **options) -> Objective:
    """The objective registered as ``name``, built with its options.

    Raises:
        ValueError: an unknown name; an option that the objective lacks, or one it needs and was not given; a value out
            of range. The message lists what is known.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective.name {name!r}; known: {', '.join(sorted(OBJECTIVES))}")
    parameters = inspect.signature(OBJECTIVES[name]).parameters
    known = f"options of objective {name!r}: {', '.join(parameters)}"
    if unknown := sorted(options.keys() - parameters.keys()):
        raise ValueError(f"unknown option objective.{unknown[0]}; {known}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"objective.{option} is required; {known}")
    return OBJECTIVES[name](**options)


@register("bradley_terry", GOODNESS)
def bradley_terry(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """The odds of two outputs differ by exp((r_1 - r_2) / gamma): the posterior is PPO's optimal policy."""
    return scaled_rewards_GN


@register("sigmoid", GOODNESS)
def sigmoid(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """A calibrated probability sigmoid((r - center) / gamma), which saturates for rewards far above the center."""
    return F.logsigmoid(scaled_rewards_GN)


@dataclass(frozen=True)
class Scores:
    """What an objective may use: float64 [G, N], zero in masked entries; only the policy carries a gradient.

    kept_GN: bool, the outputs that count.
    """

    policy_logprobs_GN: torch.Tensor
    prior_logprobs_GN: torch.Tensor
    proposal_logprobs_GN: torch.Tensor
    rewards_GN: torch.Tensor
    kept_GN: torch.Tensor


@dataclass(frozen=True)
class ObjectiveOutput:
    """An objective's value on G groups. All float64 and detached, but for ``loss_G`` and the coefficients' dtype.

    loss_G: differentiable in the policy's log-probs; zero for a group with fewer than two outputs left.
    coefficients_GN: d(sum of loss_G) / d log q, in the policy log-probs' dtype; exactly zero for masked outputs.
    alpha_GN, beta_GN: the self-normalised weights; exactly zero for masked outputs.
    kl_G: KL(alpha_hat || beta_hat) in nats.
    ess_alpha_G, ess_beta_G: effective sample sizes 1 / sum w^2, from 1 to the number of outputs left; 0 where none is.
    max_alpha_G: the largest alpha_hat.
    zero_gradient_G: bool, the groups whose coefficients all vanish (up to the rounding of float64).
    """

    loss_G: torch.Tensor
    coefficients_GN: torch.Tensor
    alpha_GN: torch.Tensor
    beta_GN: torch.Tensor
    kl_G: torch.Tensor
    ess_alpha_G: torch.Tensor
    ess_beta_G: torch.Tensor
    max_alpha_G: torch.Tensor
    zero_gradient_G: torch.Tensor


class Objective:
    """The base of all objectives: target weights alpha, policy weights beta, and a loss.

    A subclass gives ``log_alpha``; ``log_beta`` and ``loss`` are BRAIn's unless it has others.
    """

    def log_alpha(self, scores: Scores) -> torch.Tensor:
        """log of the target's importance weights [G, N], whatever they are where masked."""
        raise NotImplementedError

    def log_beta(self, scores: Scores) -> torch.Tensor:
        """log of the policy's importance weights [G, N], likewise."""
        return scores.policy_logprobs_GN - scores.proposal_logprobs_GN

    def loss(self, scores: Scores, log_alpha_hat_GN: torch.Tensor, log_beta_hat_GN: torch.Tensor) -> torch.Tensor:
        """The loss per group [G] from the normalised log-weights (-inf where masked); alpha_hat is held constant."""
        return kl_divergence(log_alpha_hat_GN, log_beta_hat_GN)

    def __call__(
        self,
        policy_logprobs_GN: torch.Tensor,
        *,
        prior_logprobs_GN: torch.Tensor,
        proposal_logprobs_GN: torch.Tensor,
        rewards_GN: torch.Tensor,
        mask_GN: torch.Tensor | None = None,
    ) -> ObjectiveOutput:
        """Weighs the outputs of G groups.

        Args:
            policy_logprobs_GN, prior_logprobs_GN, proposal_logprobs_GN: log q, log p and log q' of whole outputs (sums
                over tokens, nats), float32 or float64. Only the first receives a gradient, in its own dtype.
            rewards_GN: rewards, any float dtype.
            mask_GN: bool, True for outputs that count (default: all). The others may hold anything, NaN included.

        Raises:
            ValueError: the matrices are not [G, N], all of one shape.
        """
        shape = policy_logprobs_GN.shape
        named = {
            "prior_logprobs_GN": prior_logprobs_GN,
            "proposal_logprobs_GN": proposal_logprobs_GN,
            "rewards_GN": rewards_GN,
        }
        for name, matrix in {**named, "mask_GN": mask_GN}.items():
            if matrix is not None and (matrix.shape != shape or len(shape) != 2):
                raise ValueError(f"{name} is {list(matrix.shape)}; policy_logprobs_GN is {list(shape)}, to be [G, N]")
        differentiable = torch.is_grad_enabled() and policy_logprobs_GN.requires_grad
        # The coefficients exist in validation too, where the caller has gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            kept_GN = torch.ones(shape, dtype=torch.bool, device=policy_logprobs_GN.device)
            if mask_GN is not None:
                kept_GN &= mask_GN.bool()
            policy_GN = policy_logprobs_GN if differentiable else policy_logprobs_GN.detach()
            policy_GN = policy_GN.to(torch.float64).masked_fill(~kept_GN, 0.0)
            if not differentiable:
                policy_GN.requires_grad_()
            constants = {k: v.detach().to(torch.float64).masked_fill(~kept_GN, 0.0) for k, v in named.items()}
            scores = Scores(policy_logprobs_GN=policy_GN, kept_GN=kept_GN, **constants)

            log_alpha_hat_GN = masked_log_softmax(self.log_alpha(scores), kept_GN).detach()
            log_beta_hat_GN = masked_log_softmax(self.log_beta(scores), kept_GN)
            loss_G = self.loss(scores, log_alpha_hat_GN, log_beta_hat_GN).masked_fill(kept_GN.sum(-1) < 2, 0.0)
            (coefficients_GN,) = torch.autograd.grad(loss_G.sum(), policy_GN, retain_graph=differentiable)

        alpha_GN, beta_GN = log_alpha_hat_GN.exp(), log_beta_hat_GN.detach().exp()
        return ObjectiveOutput(
            loss_G=loss_G if differentiable else loss_G.detach(),
            coefficients_GN=coefficients_GN.to(policy_logprobs_GN.dtype),
            alpha_GN=alpha_GN,
            beta_GN=beta_GN,
            kl_G=kl_divergence(log_alpha_hat_GN, log_beta_hat_GN.detach()),
            ess_alpha_G=effective_sample_size(alpha_GN),
            ess_beta_G=effective_sample_size(beta_GN),
            max_alpha_G=alpha_GN.amax(-1),
            zero_gradient_G=(coefficients_GN.abs() <= ZERO_COEFFICIENT).all(-1),
        )


@register("brain")
class Brain(Objective):
    """BRAIn (Pandey et al., ICML 2024): alpha_i = p(y_i|x) p(G=1|y_i,x) / q'(y_i|x), beta_i = q(y_i|x) / q'(y_i|x).

    The loss is KL(alpha_hat || beta_hat), whose gradient is - sum_i (alpha_hat_i - beta_hat_i) grad log q(y_i|x).

    Args:
        gamma: reward temperature, in units of the reward; with Bradley-Terry goodness it is PPO's KL coefficient.
        goodness: a key of ``GOODNESS``.
        goodness_center: the reward at which a sigmoid gives 1/2; it cancels in Bradley-Terry's odds.
    """

    def __init__(self, gamma: float, goodness: str = "bradley_terry", goodness_center: float = 0.0):
        if not gamma > 0:
            raise ValueError(f"objective.gamma is {gamma}; it must be positive")
        if goodness not in GOODNESS:
            raise ValueError(f"unknown objective.goodness {goodness!r}; known: {', '.join(sorted(GOODNESS))}")
        self.gamma = gamma
        self.goodness = GOODNESS[goodness]
        self.goodness_center = goodness_center

    def log_alpha(self, scores: Scores) -> torch.Tensor:
        log_goodness_GN = self.goodness((scores.rewards_GN - self.goodness_center) / self.gamma)
        return scores.prior_logprobs_GN + log_goodness_GN - scores.proposal_logprobs_GN


@register("dpo_sft")
class DPOSft(Objective):
    """DPO-sft: the output of the largest reward against the others, with log beta_i = beta (log q - log p).

    With two outputs the loss is DPO's, -log sigmoid(beta [(log q_w - log p_w) - (log q_l - log p_l)]); with more, the
    same softmax over all of them. Outputs that tie for the largest reward share the target evenly, which is the limit
    of softmax(r / gamma) and does not depend on the outputs' order: a pair of equal rewards pulls q back to p.
    The proposal is the prior, so ``proposal_logprobs_GN`` is not used.
    """

    def __init__(self, beta: float):
        if not beta > 0:
            raise ValueError(f"objective.beta is {beta}; it must be positive")
        self.beta = beta

    def log_alpha(self, scores: Scores) -> torch.Tensor:
        rewards_GN = scores.rewards_GN.masked_fill(~scores.kept_GN, -torch.inf)
        best_GN = rewards_GN == rewards_GN.amax(-1, keepdim=True)
        return torch.zeros_like(rewards_GN).masked_fill(~best_GN, -torch.inf)

    def log_beta(self, scores: Scores) -> torch.Tensor:
        return self.beta * (scores.policy_logprobs_GN - scores.prior_logprobs_GN)


def coefficients(
    objective: Objective, policy_logprobs_GN: torch.Tensor, **scores: torch.Tensor | None
) -> tuple[torch.Tensor, ObjectiveOutput]:
    """c = d(sum_G loss_G) / d log q [G, N], for a second pass that backpropagates sum_i c_i log q_i.

    Args: as the objective's call. Works with gradients off and in inference mode.
    Returns: c, detached, in ``policy_logprobs_GN``'s dtype, and the objective's output (its loss detached).
    """
    output = objective(policy_logprobs_GN.detach(), **scores)
    return output.coefficients_GN, output


def masked_log_softmax(log_weights_GN: torch.Tensor, kept_GN: torch.Tensor) -> torch.Tensor:
    """log_softmax over the outputs kept; -inf for the others. No NaN, in value or gradient, for a group without any."""
    # A row of -inf alone would be NaN, so a group without outputs goes through the softmax as it is.
    any_G1 = kept_GN.any(-1, keepdim=True)
    log_hat_GN = log_weights_GN.masked_fill(~kept_GN & any_G1, -torch.inf).log_softmax(-1)
    return log_hat_GN.masked_fill(~kept_GN, -torch.inf)


def kl_divergence(log_alpha_hat_GN: torch.Tensor, log_beta_hat_GN: torch.Tensor) -> torch.Tensor:
    """KL(alpha_hat || beta_hat) [G] in nats, never negative; outputs of zero alpha_hat contribute exactly zero."""
    alpha_GN = log_alpha_hat_GN.exp()
    log_ratio_GN = (log_alpha_hat_GN - log_beta_hat_GN).masked_fill(alpha_GN == 0, 0.0)
    kl_G = (alpha_GN * log_ratio_GN).sum(-1)
    # Rounding can leave -1e-17, where a clamp would cut the gradient (1e-8 there): the correction is a constant.
    return kl_G + (-kl_G.detach()).clamp_min(0.0)


def effective_sample_size(weights_GN: torch.Tensor) -> torch.Tensor:
    """1 / sum w^2 [G] of normalised weights; 0 where all are zero."""
    squares_G = weights_GN.square().sum(-1)
    return torch.where(squares_G > 0, 1 / squares_G, 0.0)
