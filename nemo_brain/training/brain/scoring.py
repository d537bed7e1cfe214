"""Log p, log q and log q' of rewarded groups, by the training kernels where nobody knows them; and whether the
sampler's log q' are theirs.

Shapes: G groups, N outputs per group, E temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_brain.core.groups import Group, RewardedGroup, ScoredGroup, output_matrix
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.report.progress import progress
from nemo_brain.training.brain.strategy import BRAInStrategy


class ProposalGap(ValueError):
    """The sampler's log q' are not those of the training kernels."""


class Scorer:
    """Scores groups. All ranks call it in the same order with the same arguments.

    Args:
        strategy: scores.
        max_gap: nats per token by which the sampler's log q' may differ from the training kernels', on average.
        refresh: what the proposal is, see ``rollout.refresh``.
    """

    def __init__(self, strategy: BRAInStrategy, max_gap: float, refresh: str):
        self._strategy = strategy
        self._max_gap = max_gap
        self._refresh = refresh

    def score(
        self, groups: Sequence[RewardedGroup], temperature: float | None, untrained: bool, validation: bool = False
    ) -> tuple[list[ScoredGroup], float | None]:
        """log p, log q and log q' of every output, by the training kernels where they are not known.

        Args:
            temperature: of the proposal, whose log q' is computed anew by the training kernels; None: the sampler's is
                taken, or where there is none the prior's.
            untrained: the policy still is the prior, so that one pass does for both.
            validation: the policy has sampled, whatever the proposal is.

        Returns:
            The scored groups, and where log q' is known of both kernels the mean over outputs of
            |log q' - the sampler's log q'|.

        Raises:
            ProposalGap: that is more than ``max_gap`` per token; on every rank.
        """
        # A server's outputs are rescored as they come.
        rescored = all(group.rescored_logprobs is not None for group in groups)
        wanted = () if temperature is None or rescored else (1.0,) if temperature == 1.0 else (1.0, temperature)
        # Outputs are rescored by what they were sampled from.
        by = self._sampled_by(validation, untrained)
        of_policy: tuple[float, ...] = wanted if by == "policy" else (1.0,)
        of_prior: tuple[float, ...] = wanted if by == "prior" and wanted else (1.0,)
        if not of_policy and any(group.policy_logprobs is None for group in groups):
            of_policy = (1.0,)
        # The prior does not change: what it has scored once, a server's outputs or groups that come again, it has not
        # to score again.
        prior: Any = [group.prior_logprobs if of_prior == (1.0,) else None for group in groups]
        same = untrained and (len(of_policy) > 0 or (rescored and groups[0].policy_logprobs is not None))
        unknown = [] if same else [group for group, known in zip(groups, prior, strict=True) if known is None]
        own = groups if by == "proposal" and wanted else []
        positions = sum(map(self._positions, [*(groups if of_policy else ()), *unknown, *own]))
        with progress(positions // parallel_state.get_data_parallel_world_size(), "scoring", "tokens") as bar:
            policy_EGN: Any = None
            prior_EGN: Any = None
            if of_policy:
                policy_EGN = self._strategy.policy_logprobs(groups, of_policy, bar.update)
            if unknown:
                with self._strategy.prior() as logprobs:
                    prior_EGN = logprobs(unknown, bar.update, of_prior)
            if own:
                with self._strategy.proposal() as logprobs:
                    own_EGN = logprobs(groups, bar.update, wanted[-1:])
        policy: Any = (
            [group.policy_logprobs for group in groups] if policy_EGN is None else _rows(groups, policy_EGN[0])
        )
        if same:
            prior = policy
        elif unknown:
            found = iter(_rows(unknown, prior_EGN[0]))
            prior = [known or next(found) for known in prior]
        proposal = [group.proposal_logprobs or log_p for group, log_p in zip(groups, prior, strict=True)]
        if wanted and by == "prior":
            proposal = prior if of_prior == (1.0,) else _rows(groups, prior_EGN[-1])
        elif wanted:
            proposal = _rows(groups, policy_EGN[-1] if by == "policy" else own_EGN[-1])
        elif rescored and temperature is not None:
            proposal = [group.rescored_logprobs for group in groups]
        scored = [
            ScoredGroup(
                group.prompt,
                group.outputs,
                rewards=group.rewards,
                prior_logprobs=prior[g],
                proposal_logprobs=proposal[g],
                policy_logprobs=policy[g],
                policy_steps=group.policy_steps,
            )
            for g, group in enumerate(groups)
        ]
        if not (wanted or rescored):
            return scored, None
        ours_GN = output_matrix(groups, "rescored_logprobs") if rescored else output_matrix(scored, "proposal_logprobs")
        return scored, self._gap(groups, (ours_GN - output_matrix(groups, "proposal_logprobs")).abs().sum().item())

    def _gap(self, groups: Sequence[Group], total: float) -> float:
        """The mean over outputs of |log q' by the training kernels - by the sampler's|, whose sum is ``total``.

        Raises:
            ProposalGap: it is too large.
        """
        outputs = [output for group in groups for output in group.outputs]
        per_token = total / sum(len(output.token_ids) for output in outputs)
        if not per_token <= self._max_gap:
            raise ProposalGap(
                f"the sampler's log q' differ from those of the training kernels by {per_token:.3g} nats per token on "
                f"average, and rollout.max_proposal_gap is {self._max_gap:g}: it does not sample from the law that "
                "rollout.rescore_proposal computes (a server: docs/remote_sampling.md), or in a lower precision; "
                "nothing was trained on these outputs"
            )
        return total / len(outputs)

    def _sampled_by(self, validation: bool, untrained: bool) -> str:
        """Whose outputs they are: the ``policy``'s, the ``prior``'s, or those of the ``proposal``'s own weights."""
        if validation or untrained or self._refresh == "always":
            return "policy"
        return "proposal" if self._strategy.proposal_moved else "prior"

    def _positions(self, group: Group) -> int:
        return chunk_tokens(group, range(len(group.outputs)), self._strategy.layout)


def _rows(groups: Sequence[Group], values_GN: torch.Tensor) -> list[list[float]]:
    """Each group's values; a group may have fewer outputs than others."""
    return [row[: len(group.outputs)] for group, row in zip(groups, values_GN.tolist(), strict=True)]
