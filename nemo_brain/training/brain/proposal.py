"""Where a proposal q' of its own lives, the policy as it was at some iteration, between the passes that use it.

It is put where the prior is: beside the policy, or on the host. Of a model with adapters they are all that differs, so
that the proposal is one more set of them, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values

from nemo_brain.model.parameters import is_adapter, unwrap
from nemo_brain.training.brain.prior import OffloadedPrior, Prior, ResidentPrior, trained_parameters

_PREFIX = "proposal."  # what precedes its tensors in a checkpoint


class Proposal(Prior, Protocol):
    """A ``Prior`` that moves."""

    def take(self, policy: Sequence[torch.nn.Module]) -> None:
        """From now on its weights are the policy's as they stand."""

    def sharded_state(self, policy: Sequence[torch.nn.Module]) -> dict[str, Any]:
        """Its tensors, chunk by chunk, as Megatron's distributed checkpoints have them, apart from the policy's."""


class ResidentProposal(ResidentPrior):
    """A third copy of this rank's chunks, beside the policy and a resident prior."""

    @torch.no_grad()
    def take(self, policy: Sequence[torch.nn.Module]) -> None:
        """See ``Proposal``."""
        for mine, theirs in zip(self._chunks, policy, strict=True):
            pairs = zip(unwrap(mine).parameters(), unwrap(theirs).parameters(), strict=True)
            for own, parameter in pairs:
                own.copy_(parameter)

    def sharded_state(self, policy: Sequence[torch.nn.Module]) -> dict[str, Any]:
        """See ``Proposal``."""
        return _sharded_state(self._chunks)


class OffloadedProposal(OffloadedPrior):
    """Weights in host memory, moved into the policy's own parameters for sampling and scoring only."""

    def take(self, policy: Sequence[torch.nn.Module]) -> None:
        """See ``Proposal``."""
        for own, parameter in zip(self._weights, trained_parameters(policy), strict=True):
            own.copy_(parameter)

    def sharded_state(self, policy: Sequence[torch.nn.Module]) -> dict[str, Any]:
        """See ``Proposal``."""
        parameters = trained_parameters(policy)
        own = {parameter.data_ptr(): weight for parameter, weight in zip(parameters, self._weights, strict=True)}
        state = _sharded_state(policy)
        for part in nested_values(state):
            if isinstance(getattr(part, "data", None), torch.Tensor):
                part.data = own[part.data.data_ptr()]
        return state


def load_proposal(proposal: Proposal, policy: Sequence[torch.nn.Module], weights: Path) -> None:
    """Gives it what its ``sharded_state`` gave a checkpoint. A collective of all ranks."""
    with proposal.chunks(policy) as chunks:
        found = dist_checkpointing.load({"proposal": _sharded_state(chunks)}, str(weights))["proposal"]
        for number, chunk in enumerate(chunks):
            state = {name.removeprefix(_PREFIX): value for name, value in found[str(number)].items()}
            # Of a model with adapters they are all that a checkpoint has.
            unwrap(chunk).load_state_dict(state, strict=not any(map(is_adapter, state)))
        proposal.take(chunks)


def _sharded_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {str(number): unwrap(chunk).sharded_state_dict(prefix=_PREFIX) for number, chunk in enumerate(chunks)}
