"""Groups: a prompt with its n outputs, the unit of everything here.

Shapes: G groups, N outputs per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Prompt:
    """One prompt x. ``text`` is what the tokenizer saw (the template applied); ``token_ids`` may be its end only
    (``truncated``)."""

    id: str
    text: str
    token_ids: list[int]
    reference: str | None = None
    metadata: dict = field(default_factory=dict)
    truncated: bool = False


@dataclass
class Output:
    """One output y. ``token_ids`` includes the end token when the model emitted it (``ended``).

    Log-probs are sums over ``token_ids`` in nats: ``proposal_logprob`` is log q' of the law that was sampled
    (temperature included), ``policy_logprob`` is the policy's own log-prob at temperature 1 when the proposal was
    refreshed.
    """

    token_ids: list[int]
    text: str
    ended: bool
    reward: float | None = None
    prior_logprob: float | None = None
    proposal_logprob: float | None = None
    policy_logprob: float | None = None


@dataclass
class Group:
    """One prompt with its outputs."""

    prompt: Prompt
    outputs: list[Output]


def output_matrix(groups: Sequence[Group], name: str) -> torch.Tensor:
    """One field of every output, [G, N] float64; zero where a group has no such output."""
    matrix_GN = torch.zeros(len(groups), max(len(group.outputs) for group in groups), dtype=torch.float64)
    for g, group in enumerate(groups):
        values = [getattr(output, name) for output in group.outputs]
        matrix_GN[g, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return matrix_GN


@dataclass
class Rollout:
    """The scored groups of one iteration."""

    iteration: int
    groups: list[Group]
