"""Where the frozen prior p lives between the scoring passes of successive iterations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from nemo_brain.model.lora import switched_off


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


class OffloadedPrior:
    """The prior's weights in host memory, moved into the policy's own parameters for the scoring only.

    Scoring then runs through the very modules of the policy and needs no device memory of its own. What is frozen in
    the policy is the prior's, and stays where it is. The two host buffers (the prior's weights, and the policy's while
    it makes room) are allocated once, pinned where there is CUDA. There the policy leaves on one stream while the prior
    follows it in on another: the two directions of the link work at the same time.

    Args:
        policy: this rank's chunks, holding the prior's weights at this moment.
        beside: another such model, whose buffer for the policy serves both: they are not used at the same time.
    """

    def __init__(self, policy: Sequence[torch.nn.Module], beside: OffloadedPrior | None = None):
        self._cuda = torch.cuda.is_available()
        parameters = list(trained_parameters(policy))
        self._weights = [_host_buffer(parameter, self._cuda).copy_(parameter) for parameter in parameters]
        room = [_host_buffer(parameter, self._cuda) for parameter in parameters] if beside is None else beside._policy
        self._policy: list[torch.Tensor] = room
        self._streams = (torch.cuda.Stream(), torch.cuda.Stream()) if self._cuda else None

    @contextlib.contextmanager
    def chunks(self, policy: Sequence[torch.nn.Module]) -> Iterator[Sequence[torch.nn.Module]]:
        """The policy's chunks, with the prior's weights while the context lasts; the policy's return bit by bit."""
        parameters = list(trained_parameters(policy))
        self._exchange(parameters, self._policy, self._weights)
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


def trained_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """Those that are trained."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                yield parameter.detach()


def _host_buffer(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=pin)
