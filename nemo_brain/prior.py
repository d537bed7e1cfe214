"""Where the frozen prior p lives between the scoring passes of successive iterations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


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

    Scoring then runs through the very modules of the policy and needs no device memory of its own. The two host buffers
    (the prior's weights, and the policy's while it makes room) are allocated once, pinned where there is CUDA.

    Args:
        policy: this rank's chunks, holding the prior's weights at this moment.
    """

    def __init__(self, policy: Sequence[torch.nn.Module]):
        pin = torch.cuda.is_available()
        self._prior = [_host_copy(parameter, pin) for parameter in _parameters(policy)]
        self._policy = [torch.empty_like(weights, pin_memory=pin) for weights in self._prior]

    @contextlib.contextmanager
    def chunks(self, policy: Sequence[torch.nn.Module]) -> Iterator[Sequence[torch.nn.Module]]:
        """The policy's chunks, with the prior's weights while the context lasts; the policy's return bit by bit."""
        parameters = list(_parameters(policy))
        _copy(parameters, self._policy)
        _copy(self._prior, parameters)
        try:
            yield policy
        finally:
            _copy(self._policy, parameters)


def _parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        for parameter in chunk.parameters():
            yield parameter.detach()


def _host_copy(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor)


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copies all tensors, then waits: the host buffers are read and written by the device in the background."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
