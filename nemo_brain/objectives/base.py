"""What an objective is: weights and a loss on groups of outputs, from whole outputs' log-probs and rewards.

Its gradient with respect to the log-probs is a tiny matrix of coefficients, which the trainer can apply in one pass or
in two.

Shapes: G groups (prompts), N outputs per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_brain.host.send import sent

# Coefficients below this are rounding: log-probs of 1e4 nats carry 2e-12 each in float64, an output a few of them.
ZERO_COEFFICIENT = 1e-10


@dataclass(frozen=True)
class ObjectiveInputs:
    """What an objective may use: float64 [G, N], zero in masked entries; only the policy carries a gradient.

    Attributes:
        kept_GN: bool, the outputs that count.
        lengths_GN: tokens of each output, None where the caller has not said.
        prompt_ids: a name for each group's prompt, the same at every visit; likewise.
    """

    policy_logprobs_GN: torch.Tensor
    prior_logprobs_GN: torch.Tensor
    proposal_logprobs_GN: torch.Tensor
    rewards_GN: torch.Tensor
    kept_GN: torch.Tensor
    lengths_GN: torch.Tensor | None = None
    prompt_ids: Sequence[str] | None = None

    def of_groups(self, groups: Sequence[int]) -> ObjectiveInputs:
        """Those of some groups."""
        index = _index(groups, self.kept_GN.device)
        parts: dict[str, Any] = {
            name: None if value is None else value.index_select(0, index)
            for name, value in vars(self).items()
            if name[-3:] == "_GN"
        }
        ids = None if self.prompt_ids is None else [self.prompt_ids[g] for g in groups]
        return ObjectiveInputs(**parts, prompt_ids=ids)

    def mean(self, values_GN: torch.Tensor) -> torch.Tensor:
        """The mean over the outputs that count [G]."""
        return values_GN.masked_fill(~self.kept_GN, 0.0).sum(-1) / self.kept_GN.sum(-1)


@dataclass(frozen=True)
class LogWeights:
    """An objective's log-weights, float64 [G, N], raw and normalised: a loss takes those it wants.

    Attributes:
        log_alpha_GN: as the objective gives them, zero where masked; constant.
        log_beta_GN: likewise, with the policy's gradient.
        log_alpha_hat_GN: log_softmax of ``log_alpha_GN`` over the outputs that count, -inf where masked.
        log_beta_hat_GN: that of ``log_beta_GN``.
    """

    log_alpha_GN: torch.Tensor
    log_beta_GN: torch.Tensor
    log_alpha_hat_GN: torch.Tensor
    log_beta_hat_GN: torch.Tensor

    def of_groups(self, groups: Sequence[int]) -> LogWeights:
        """Those of some groups."""
        index = _index(groups, self.log_alpha_GN.device)
        return LogWeights(*(matrix_GN.index_select(0, index) for matrix_GN in vars(self).values()))


@dataclass(frozen=True)
class ObjectiveOutput:
    """An objective's value on G groups. All float64 and detached, but for ``loss_G`` and the coefficients' dtype.

    Attributes:
        loss_G: differentiable in the policy's log-probs; zero for a group with fewer outputs left than
            ``smallest_group``.
        coefficients_GN: d(sum of loss_G) / d log q, in the policy log-probs' dtype; exactly zero for masked outputs.
        alpha_GN: the target's self-normalised weights; exactly zero for masked outputs.
        beta_GN: the policy's, likewise.
        kl_G: KL(alpha_hat || beta_hat) in nats.
        ess_alpha_G: effective sample size 1 / sum alpha^2, from 1 to the number of outputs left; 0 where none is.
        ess_beta_G: that of beta.
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
    """The base of all objectives: target weights alpha, policy weights beta, a loss, and state if it has any.

    A subclass gives ``log_alpha``; ``log_beta`` and ``loss`` are BRAIn's unless it has others. The loss of a group
    depends on that group and on the state alone, because the trainer divides a batch's groups as the layout wants.

    One with state (a running normaliser, say) also gives ``update``, ``state_dict`` and ``load_state_dict``. Its state
    changes in ``update`` and nowhere else.

    Attributes:
        smallest_group: groups with fewer outputs left contribute nothing; ``loss`` and ``update`` do not see them.
    """

    smallest_group = 2

    def log_alpha(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """log of the target's importance weights [G, N], whatever they are where masked; held constant."""
        raise NotImplementedError

    def log_beta(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """log of the policy's importance weights [G, N], likewise, with the policy's gradient."""
        return inputs.policy_logprobs_GN - inputs.proposal_logprobs_GN

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        """The loss per group [G]."""
        return kl_divergence(weights.log_alpha_hat_GN, weights.log_beta_hat_GN)

    def update(self, inputs: ObjectiveInputs, weights: LogWeights) -> None:
        """Advances the state by one step, of these groups of its global batch; without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON has it: numbers, strings, lists, and dictionaries with strings as keys."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state that ``state_dict`` gave."""

    def __call__(
        self,
        policy_logprobs_GN: torch.Tensor,
        *,
        prior_logprobs_GN: torch.Tensor,
        proposal_logprobs_GN: torch.Tensor,
        rewards_GN: torch.Tensor,
        mask_GN: torch.Tensor | None = None,
        lengths_GN: torch.Tensor | None = None,
        prompt_ids: Sequence[str] | None = None,
    ) -> ObjectiveOutput:
        """Weighs the outputs of G groups; the state stays as it is.

        Args:
            policy_logprobs_GN, prior_logprobs_GN, proposal_logprobs_GN: log q, log p and log q' of whole outputs (sums
                over tokens, nats), float32 or float64. Only the first receives a gradient, in its own dtype.
            rewards_GN: rewards, any float dtype.
            mask_GN: bool, True for outputs that count (default: all). The others may hold anything, NaN included.
                It and the scores may lie on the host while log q is on a device: nothing then waits for the device,
                unless the objective itself does.
            lengths_GN, prompt_ids: the outputs' numbers of tokens and the prompts' names, for objectives that use them.

        Raises:
            ValueError: the matrices are not [G, N], all of one shape, or a subclass's loss is not [G].
        """
        differentiable = torch.is_grad_enabled() and policy_logprobs_GN.requires_grad
        # The coefficients exist in validation too, where the caller has gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = _inputs(
                policy_logprobs_GN if differentiable else policy_logprobs_GN.detach(),
                mask_GN,
                prompt_ids,
                prior_logprobs_GN=prior_logprobs_GN,
                proposal_logprobs_GN=proposal_logprobs_GN,
                rewards_GN=rewards_GN,
                lengths_GN=lengths_GN,
            )
            kept_GN, policy_GN = inputs.kept_GN, inputs.policy_logprobs_GN
            if not differentiable:
                policy_GN.requires_grad_()
            weights = self._weights(inputs)
            loss_G = self._loss(inputs, weights, self._large_enough(kept_GN if mask_GN is None else mask_GN))
            (coefficients_GN,) = torch.autograd.grad(loss_G.sum(), policy_GN, retain_graph=differentiable)
            coefficients_GN = coefficients_GN.masked_fill(~kept_GN, 0.0)

        log_alpha_hat_GN, log_beta_hat_GN = weights.log_alpha_hat_GN, weights.log_beta_hat_GN.detach()
        alpha_GN, beta_GN = log_alpha_hat_GN.exp(), log_beta_hat_GN.exp()
        return ObjectiveOutput(
            loss_G=loss_G if differentiable else loss_G.detach(),
            coefficients_GN=coefficients_GN.to(policy_logprobs_GN.dtype),
            alpha_GN=alpha_GN,
            beta_GN=beta_GN,
            kl_G=kl_divergence(log_alpha_hat_GN, log_beta_hat_GN),
            ess_alpha_G=effective_sample_size(alpha_GN),
            ess_beta_G=effective_sample_size(beta_GN),
            max_alpha_G=alpha_GN.amax(-1),
            zero_gradient_G=(coefficients_GN.abs() <= ZERO_COEFFICIENT).all(-1),
        )

    def advance(
        self,
        policy_logprobs_GN: torch.Tensor,
        *,
        mask_GN: torch.Tensor | None = None,
        prompt_ids: Sequence[str] | None = None,
        **scores: torch.Tensor,
    ) -> None:
        """Advances the state by one optimizer step.

        The trainer calls it once per step, after the step's passes and with the whole global batch, the same on every
        rank; also where the step is left out because its gradient is not finite. Groups with a number that is not
        finite do not reach the state.

        Args: as the call.
        """
        with torch.no_grad():
            inputs = _inputs(policy_logprobs_GN, mask_GN, prompt_ids, **scores)
            logprobs_GN = inputs.policy_logprobs_GN + inputs.prior_logprobs_GN + inputs.proposal_logprobs_GN
            finite = (logprobs_GN + inputs.rewards_GN).isfinite().all(-1).tolist()
            usable = [g for g in self._large_enough(inputs.kept_GN) if finite[g]]
            if usable:
                self.update(inputs.of_groups(usable), self._weights(inputs).of_groups(usable))

    def _weights(self, inputs: ObjectiveInputs) -> LogWeights:
        masked_GN = ~inputs.kept_GN
        log_alpha_GN = self.log_alpha(inputs).detach()
        log_beta_GN = self.log_beta(inputs)
        return LogWeights(
            log_alpha_GN.masked_fill(masked_GN, 0.0),
            log_beta_GN.masked_fill(masked_GN, 0.0),
            masked_log_softmax(log_alpha_GN, inputs.kept_GN),
            masked_log_softmax(log_beta_GN, inputs.kept_GN),
        )

    def _loss(self, inputs: ObjectiveInputs, weights: LogWeights, groups: Sequence[int]) -> torch.Tensor:
        loss_G = self.loss(inputs.of_groups(groups), weights.of_groups(groups))
        expected = (len(groups),)
        if loss_G.shape != expected:
            raise ValueError(
                f"{type(self).__name__}.loss is {list(loss_G.shape)}; it must be [G], here {list(expected)}"
            )
        all_G = loss_G.new_zeros(len(inputs.kept_GN), dtype=torch.float64)
        return all_G.index_copy(0, _index(groups, all_G.device), loss_G.double())

    def _large_enough(self, mask_GN: torch.Tensor) -> list[int]:
        """The groups with enough outputs; read where the mask lies."""
        return [g for g, count in enumerate(mask_GN.sum(-1).tolist()) if count >= self.smallest_group]


def coefficients(
    objective: Objective, policy_logprobs_GN: torch.Tensor, **scores: Any
) -> tuple[torch.Tensor, ObjectiveOutput]:
    """c = d(sum_G loss_G) / d log q [G, N], for a second pass that backpropagates sum_i c_i log q_i.

    Args: as the objective's call. Works with gradients off and in inference mode.
    Returns: c, detached, in ``policy_logprobs_GN``'s dtype, and the objective's output (its loss detached).
    """
    output = objective(policy_logprobs_GN.detach(), **scores)
    return output.coefficients_GN, output


def _inputs(
    policy_logprobs_GN: torch.Tensor,
    mask_GN: torch.Tensor | None,
    prompt_ids: Sequence[str] | None,
    **matrices_GN: torch.Tensor | None,
) -> ObjectiveInputs:
    """Checked, in float64, zero where masked; all but the policy's log-probs detached."""
    shape = policy_logprobs_GN.shape
    for name, matrix_GN in {**matrices_GN, "mask_GN": mask_GN}.items():
        if matrix_GN is not None and (matrix_GN.shape != shape or len(shape) != 2):
            raise ValueError(f"{name} is {list(matrix_GN.shape)}; policy_logprobs_GN is {list(shape)}, to be [G, N]")
    if prompt_ids is not None and len(prompt_ids) != shape[0]:
        raise ValueError(f"prompt_ids names {len(prompt_ids)} prompts; policy_logprobs_GN has {shape[0]} groups")
    device = policy_logprobs_GN.device
    kept_GN = torch.ones(shape, dtype=torch.bool, device=device) if mask_GN is None else sent(mask_GN.bool(), device)
    policy_GN = policy_logprobs_GN.to(torch.float64).masked_fill(~kept_GN, 0.0)
    constants_GN: dict[str, Any] = {
        name: None if matrix_GN is None else sent(matrix_GN.detach(), device, torch.float64).masked_fill(~kept_GN, 0.0)
        for name, matrix_GN in matrices_GN.items()
    }
    return ObjectiveInputs(policy_GN, kept_GN=kept_GN, prompt_ids=prompt_ids, **constants_GN)


def _index(groups: Sequence[int], device: torch.device) -> torch.Tensor:
    """An index of the groups that lies on the device, without waiting for it."""
    return sent(torch.tensor(groups, dtype=torch.int64), device)


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


def target_divergences(
    alpha_GN: torch.Tensor, log_ratios_GN: torch.Tensor, mask_GN: torch.Tensor
) -> tuple[float, float]:
    """Estimates of KL(target || proposal) and of KL(target || policy) in nats, means over the groups.

    By self-normalised importance weights: E_target[f] is sum alpha_hat f, and target / proposal is n alpha_hat.

    Args:
        alpha_GN: the target's self-normalised weights against the proposal.
        log_ratios_GN: log q - log q'.
        mask_GN: bool, the outputs that count; a group without any is left out.
    """
    counted_G = mask_GN.sum(-1) > 0
    alpha_GN, mask_GN = alpha_GN[counted_G].double(), mask_GN[counted_G]
    if not len(alpha_GN):
        return math.nan, math.nan
    excess_G = torch.special.xlogy(alpha_GN, alpha_GN).sum(-1) + mask_GN.sum(-1).double().log()
    gained_G = (alpha_GN * log_ratios_GN[counted_G].double().masked_fill(~mask_GN, 0.0)).sum(-1)
    return excess_G.mean().item(), (excess_G - gained_G).mean().item()


def effective_sample_size(weights_GN: torch.Tensor) -> torch.Tensor:
    """1 / sum w^2 [G] of normalised weights; 0 where all are zero."""
    squares_G = weights_GN.square().sum(-1)
    return torch.where(squares_G > 0, 1 / squares_G, 0.0)


def check_number(option: str, value: float, *, positive: bool = False) -> None:
    """Raises ValueError unless the option is a finite number, and above 0 where it has to be ``positive``."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or (positive and value <= 0):
        kind = "positive" if positive else "finite"
        raise ValueError(f"objective.{option} is {value!r}; it must be a {kind} number")
