"""Where the frozen prior p lives between the scoring passes of successive iterations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing

from nemo_brain.model.lora import switched_off
from nemo_brain.model.parameters import unwrap

_PROPOSAL = "proposal."  # what precedes its tensors in a checkpoint


class Prior(Protocol):
    """Where the prior's weights are, and how one scores with them."""

    def chunks(self, policy: Sequence[torch.nn.Module]) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """The chunks to score with, while the context lasts; ``policy``: those in training."""


class ResidentPrior:
    """A second, frozen copy of this rank's chunks beside the policy."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self._chunks = [chunk.eval().requires_grad_(False) for chunk in chunks]

    @contextlib.contextmanager
    def chunks(self, policy: Sequence[torch.nn.Module]) -> Iterator[Sequence[torch.nn.Module]]:
        """The chunks to score with."""
        yield self._chunks

    @torch.no_grad()
    def take(self, policy: Sequence[torch.nn.Module]) -> None:
        """Takes the policy's weights: it is a proposal then, and no prior."""
        for mine, theirs in zip(self._chunks, policy, strict=True):
            pairs = zip(unwrap(mine).parameters(), unwrap(theirs).parameters(), strict=True)
            for own, parameter in pairs:
                own.copy_(parameter)

    def sharded_state(self) -> dict[str, Any]:
        """Its tensors, chunk by chunk, as Megatron's distributed checkpoints have them, apart from the policy's."""
        chunks = [unwrap(chunk) for chunk in self._chunks]
        return {str(number): chunk.sharded_state_dict(prefix=_PROPOSAL) for number, chunk in enumerate(chunks)}

    def load(self, weights: Path) -> None:
        """Takes what ``sharded_state`` gave a checkpoint. A collective of all ranks."""
        found = dist_checkpointing.load({"proposal": self.sharded_state()}, str(weights))["proposal"]
        for number, chunk in enumerate(self._chunks):
            state = {name.removeprefix(_PROPOSAL): value for name, value in found[str(number)].items()}
            unwrap(chunk).load_state_dict(state)


class OffloadedPrior:
    """The prior's weights in host memory, moved into the policy's own parameters for the scoring only.

    Scoring then runs through the very modules of the policy and needs no device memory of its own. What is frozen in
    the policy is the prior's, and stays where it is. The two host buffers (the prior's weights, and the policy's while
    it makes room) are allocated once, pinned where there is CUDA. There the policy leaves on one stream while the prior
    follows it in on another: the two directions of the link work at the same time.

    Args:
        policy: this rank's chunks, holding the prior's weights at this moment.
    """

    def __init__(self, policy: Sequence[torch.nn.Module]):
        self._cuda = torch.cuda.is_available()
        self._prior = [_host_buffer(parameter, self._cuda).copy_(parameter) for parameter in _parameters(policy)]
        self._policy = [_host_buffer(parameter, self._cuda) for parameter in _parameters(policy)]
        self._streams = (torch.cuda.Stream(), torch.cuda.Stream()) if self._cuda else None

    @contextlib.contextmanager
    def chunks(self, policy: Sequence[torch.nn.Module]) -> Iterator[Sequence[torch.nn.Module]]:
        """The policy's chunks, with the prior's weights while the context lasts; the policy's return bit by bit."""
        parameters = list(_parameters(policy))
        self._exchange(parameters, self._policy, self._prior)
        try:
            yield policy
        finally:
            self._exchange(parameters, None, self._policy)

    def _exchange(self, parameters: Any, leaving: list[torch.Tensor] | None, entering: list[torch.Tensor]) -> None:
        """Copies the parameters to ``leaving`` (None: they are dropped) and ``entering`` to the parameters."""
        if not self._cuda:
            for i, parameter in enumerate(parameters):
                if leaving is not None:
                    leaving[i].copy_(parameter)
                parameter.copy_(entering[i])
            return
        assert self._streams is not None
        out, into = self._streams
        current = torch.cuda.current_stream()
        out.wait_stream(current)
        into.wait_stream(current)
        for i, parameter in enumerate(parameters):
            if leaving is not None:
                with torch.cuda.stream(out):
                    leaving[i].copy_(parameter, non_blocking=True)
                into.wait_event(out.record_event())
            with torch.cuda.stream(into):
                parameter.copy_(entering[i], non_blocking=True)
        # Whatever comes next on the current stream waits; the host does not.
        current.wait_stream(into)


class AdapterOffPrior:
    """The policy's own chunks with their adapters switched off: the frozen weights are the prior, and held once."""

    @contextlib.contextmanager
    def chunks(self, policy: Sequence[torch.nn.Module]) -> Iterator[Sequence[torch.nn.Module]]:
        """The policy's chunks, without the adapters while the context lasts."""
        with switched_off(policy):
            yield policy


def _parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """Those that are trained."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                yield parameter.detach()


def _host_buffer(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=pin)
