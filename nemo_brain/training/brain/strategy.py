"""The strategy of a BRAIn run: its training step and scoring passes, and the prior's placement."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_brain.core.groups import Group, Prompt, SampledGroup, ScoredGroup
from nemo_brain.durability.checkpoint import read_json
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.passes import BRAInPasses, Scores, StepResult
from nemo_brain.training.brain.prior import AdapterOffPrior, OffloadedPrior, Prior, ResidentPrior
from nemo_brain.training.brain.proposal import OffloadedProposal, Proposal, ResidentProposal, load_proposal
from nemo_brain.training.strategy import PackedStrategy


@dataclass(frozen=True)
class TrainStep:
    """The batch of an optimizer step: the groups of a global batch (the same on every rank), their scores, and, where
    the training kernels have scored the policy since its last change, its log-probs [G, N]."""

    groups: Sequence[ScoredGroup]
    scores: Scores
    policy_logprobs_GN: torch.Tensor | None = None


class BRAInStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``TrainStep``s.

    Args:
        prior_placement: ``resident``, ``offload`` or, for a model with adapters, ``adapter_off``: see ``prior``.
        own_proposal: the proposal has weights of its own, at first the prior's: see ``proposal``.
        **options: PackedStrategy's own.
    """

    def __init__(self, *, prior_placement: str, own_proposal: bool = False, **options: Any):
        super().__init__(**options)
        self._prior_placement = prior_placement
        self._own_proposal = own_proposal
        self._proposal: Proposal | None = None
        self.proposal_moved = False
        self._passes: BRAInPasses | None = None
        self._prior: Prior | None = None

    def setup(self, trainer: pl.Trainer) -> None:
        """PackedStrategy's, then the passes and the prior."""
        super().setup(trainer)
        model = self.lightning_module
        self._passes = BRAInPasses(model.config, self.layout, self.micro_batch_tokens)
        if self._prior_placement == "adapter_off":
            self._prior = AdapterOffPrior()
        elif self._prior_placement == "offload":
            self._prior = OffloadedPrior(self.chunks)
        else:
            self._prior = ResidentPrior(self.build_frozen_chunks(model.config, model.weights))
        if self._own_proposal and isinstance(self._prior, ResidentPrior) and model.lora is None:
            self._proposal = ResidentProposal(self.build_frozen_chunks(model.config, model.weights))
        elif self._own_proposal:
            beside = self._prior if isinstance(self._prior, OffloadedPrior) else None
            self._proposal = OffloadedProposal(self.chunks, beside)

    @property
    def passes(self) -> BRAInPasses:
        assert self._passes is not None, "the strategy has not been set up"
        return self._passes

    def run_step(self, batch: TrainStep) -> StepResult:
        objective = self.lightning_module.objective
        return self.passes.train(self.chunks, batch.groups, batch.scores, objective, batch.policy_logprobs_GN)

    def policy_logprobs(
        self, groups: Sequence[Group], temperatures: tuple[float, ...], on_tokens: Callable[[int], None]
    ) -> torch.Tensor:
        """log q of the policy as it stands, by the training kernels: [E, G, N], the same on every rank; an overlapped
        gather of the weights has then ended."""
        return self.passes.logprobs(self.chunks, groups, temperatures, on_tokens)

    def refresh_proposal(self) -> None:
        """From now on the proposal's own weights are the policy's as they stand."""
        assert self._proposal is not None
        self.wait_for_param_gather()
        self._proposal.take(self.chunks)
        self.proposal_moved = True

    @contextlib.contextmanager
    def prior(self, alone: bool = False) -> Iterator[Callable[..., torch.Tensor]]:
        """While the context lasts: ``f(groups, on_tokens, temperatures)`` is log p by the training kernels, [E, G, N],
        at temperature 1 unless others are given; the same on every rank, or with ``alone`` on those of this
        model-parallel group, whose own groups they are."""
        with self._prior_chunks() as chunks:
            yield functools.partial(self._logprobs, chunks, alone)

    @contextlib.contextmanager
    def policy(self, alone: bool = False) -> Iterator[Callable[..., torch.Tensor]]:
        """As ``prior``, of the policy as it stands."""
        with self.policy_chunks() as chunks:
            yield functools.partial(self._logprobs, chunks, alone)

    @contextlib.contextmanager
    def proposal(self, alone: bool = False) -> Iterator[Callable[..., torch.Tensor]]:
        """As ``prior``, of the proposal's own weights."""
        with self.proposal_chunks() as chunks:
            yield functools.partial(self._logprobs, chunks, alone)

    def _logprobs(
        self, chunks: Any, alone: bool, groups: Any, on_tokens: Any, temperatures: tuple[float, ...] = (1.0,)
    ) -> torch.Tensor:
        return self.passes.logprobs(chunks, groups, temperatures, on_tokens, alone)

    def sample_frozen(
        self, prompts: Sequence[Prompt], options: SamplingOptions, *arguments: Any
    ) -> Iterator[tuple[int, SampledGroup]]:
        """As ``sample``, from the proposal's own weights, or where there are none from the prior."""
        frozen = self._prior_chunks() if self._proposal is None else self.proposal_chunks()
        with frozen as chunks:
            yield from self.sampler(chunks, options).sample(prompts, *arguments)

    def policy_chunks(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """The chunks in training, all of whose weights are there."""
        self.wait_for_param_gather()
        return contextlib.nullcontext(self.chunks)

    def proposal_chunks(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """The chunks with the proposal's own weights, while the context lasts."""
        assert self._proposal is not None
        self.wait_for_param_gather()
        return self._proposal.chunks(self.chunks)

    def _prior_chunks(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        assert self._prior is not None, "the strategy has not been set up"
        self.wait_for_param_gather()
        return self._prior.chunks(self.chunks)

    # Checkpoints: the proposal's own weights are a part of them, once they are not the prior's any more.

    def save_checkpoint(self, checkpoint: dict, *args: Any, **kwargs: Any) -> None:
        """NeMo's, with the proposal."""
        if self._proposal is not None and self.proposal_moved:
            checkpoint["proposal"] = self._proposal.sharded_state(self.chunks)
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, checkpoint_path: Any, selective_restore: bool = False) -> dict:
        """PackedStrategy's, with the proposal."""
        checkpoint = super().load_checkpoint(checkpoint_path, selective_restore)
        path = self.resumed_from
        if self._proposal is not None and path is not None and read_json(path / "state.json")["state"]["refreshed"]:
            load_proposal(self._proposal, self.chunks, path / "weights")
            self.proposal_moved = True
        return checkpoint
