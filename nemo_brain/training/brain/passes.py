"""BRAIn's forward-backward passes over groups, by both exact routes.

Shapes: G groups of the global batch, N outputs per group, E temperatures, T targets and K outputs of a micro-batch.

- one pass: every group lies in one micro-batch; its coefficients c = d loss / d log q come from that micro-batch.
- two pass: groups are spread over micro-batches or data-parallel ranks; a pass without gradients collects log q first,
  every rank computes the same coefficients, and the second pass backpropagates sum c_i log q_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_brain.core.groups import ScoredGroup, output_matrix
from nemo_brain.core.packing import MicroBatch, chunk_tokens
from nemo_brain.host.send import sent
from nemo_brain.model.passes import GroupPasses
from nemo_brain.objectives import Objective, ObjectiveOutput, coefficients


@dataclass
class Scores:
    """What an objective needs besides log q, as matrices [G, N] (float64; mask bool, True where an output counts), and
    the names of the G prompts."""

    prior_logprobs_GN: torch.Tensor
    proposal_logprobs_GN: torch.Tensor
    rewards_GN: torch.Tensor
    mask_GN: torch.Tensor
    lengths_GN: torch.Tensor
    prompt_ids: list[str]

    @classmethod
    def of(cls, groups: Sequence[ScoredGroup], keep_truncated: bool) -> Scores:
        """Collects the groups' scores. Outputs whose reward is not finite are masked, and those without an end token
        unless ``keep_truncated``."""
        prior_GN, proposal_GN = (output_matrix(groups, name) for name in ("prior_logprobs", "proposal_logprobs"))
        mask_GN = torch.zeros(prior_GN.shape, dtype=torch.bool)
        lengths_GN = torch.zeros(prior_GN.shape, dtype=torch.float64)
        for g, group in enumerate(groups):
            for i, (output, reward) in enumerate(zip(group.outputs, group.rewards, strict=True)):
                mask_GN[g, i] = (keep_truncated or output.ended) and math.isfinite(reward)
                lengths_GN[g, i] = len(output.token_ids)
        rewards_GN, ids = output_matrix(groups, "rewards"), [group.prompt.id for group in groups]
        return cls(prior_GN, proposal_GN, rewards_GN, mask_GN, lengths_GN, ids)

    def rows(self, groups: Sequence[int]) -> dict[str, Any]:
        """The objective's keyword arguments for some of the groups."""
        matrices = {name: value[list(groups)] for name, value in vars(self).items() if name != "prompt_ids"}
        return {**matrices, "prompt_ids": [self.prompt_ids[g] for g in groups]}


@dataclass
class StepResult:
    """A training pass's outcome, the same on every rank: log q [G, N] before the step, the objective's output on the
    whole global batch, and the number of row positions that it took (over all ranks, without padding)."""

    policy_logprobs_GN: torch.Tensor
    objective: ObjectiveOutput
    tokens: int

    @property
    def loss(self) -> float:
        return self.objective.loss_G.mean().item()


class BRAInPasses(GroupPasses):
    """``GroupPasses`` that train on an objective's coefficients."""

    def train(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Sequence[ScoredGroup],
        scores: Scores,
        objective: Objective,
        policy_logprobs_GN: torch.Tensor | None = None,
    ) -> StepResult:
        """Accumulates the gradient of the mean loss over the groups into the chunks' gradient buffers, then advances
        the objective's state.

        Args:
            policy_logprobs_GN: log q if it is known from the training kernels and the weights have not changed since;
                the two-pass route then needs no pass to collect it.
        """
        planned = self._plan(groups)
        known = None
        if not planned.whole:
            known = self.logprobs(chunks, groups)[0] if policy_logprobs_GN is None else policy_logprobs_GN
            known, _ = coefficients(objective, known, **vars(scores))
        # Megatron averages over micro-batches and data-parallel ranks; ours is a mean over the groups of the batch.
        scale = len(planned.ranks[0]) * len(planned.ranks) / len(groups)
        loss = _ObjectiveLoss(objective, scores, known, scale)
        results = self._run(chunks, planned, groups, (1.0,), loss)
        policy_logprobs_GN = self._collect(results, planned, groups, 1)[0]
        _, output = coefficients(objective, policy_logprobs_GN, **vars(scores))
        objective.advance(policy_logprobs_GN, **vars(scores))
        members = [chunk for rank in planned.ranks for batch in rank for chunk in batch]
        tokens = sum(chunk_tokens(groups[chunk.group], chunk.outputs, self.layout) for chunk in members)
        return StepResult(policy_logprobs_GN, output, tokens)


@dataclass
class _ObjectiveLoss:
    """The loss of a micro-batch, sum c_i log q_i. ``known_GN``: the coefficients where they are known in advance."""

    objective: Objective
    scores: Scores
    known_GN: torch.Tensor | None
    scale: float

    def __call__(self, batch: MicroBatch, logprobs_ET: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_K = batch.output_sums(logprobs_ET[0].double())
        detached_K = logprobs_K.detach()
        device, width = logprobs_K.device, self.scores.mask_GN.shape[1]
        # Nothing here may wait for the device: what the host knows is sent, and nothing is read.
        if self.known_GN is not None:
            groups, outputs = [group for group, _ in batch.rows], [output for _, output in batch.rows]
            coefficients_K = sent(self.known_GN[groups, outputs], device)
        else:
            present = sorted({group for group, _ in batch.rows})
            place_of = {group: place for place, group in enumerate(present)}
            places = torch.tensor([place_of[group] * width + output for group, output in batch.rows], dtype=torch.int64)
            places_K = sent(places, device)
            policy_GN = detached_K.new_zeros(len(present) * width).index_copy(0, places_K, detached_K).view(-1, width)
            coefficients_GN, _ = coefficients(self.objective, policy_GN, **self.scores.rows(present))
            coefficients_K = coefficients_GN.flatten().index_select(0, places_K)
        loss = (coefficients_K * logprobs_K).sum() * self.scale
        return loss, detached_K[None]
