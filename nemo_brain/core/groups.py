"""Groups: a prompt with its n outputs, the unit of everything here, in the stages that a rollout goes through.

sampled -> rewarded -> scored. A stage is made from the one before and never changed afterwards.

Shapes: G groups, N outputs per group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch


@dataclass(frozen=True)
class Prompt:
    """One prompt x. ``text`` is what the tokenizer saw (the template applied); ``token_ids`` may be its end only
    (``truncated``)."""

    id: str
    text: str
    token_ids: list[int]
    reference: str | None = None
    metadata: dict = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True)
class Output:
    """One output y. ``token_ids`` includes the end token when the model emitted it (``ended``); ``text`` does not, but
    has other special tokens as they are spelled."""

    token_ids: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class Group:
    """One prompt with its outputs."""

    prompt: Prompt
    outputs: list[Output]


@dataclass(frozen=True, kw_only=True)
class SampledGroup(Group):
    """A group and the log-probs of its outputs that come with it; None: whoever sampled it does not know them.

    A log-prob is the sum over an output's ``token_ids`` in nats. ``proposal_logprobs`` are log q' of the law that was
    sampled (temperature included) as the sampler gives them, ``rescored_logprobs`` the same by the training kernels,
    ``policy_logprobs`` log q of the policy that sampled at temperature 1, ``prior_logprobs`` log p. ``policy_steps``
    are the optimizer steps behind the weights that began each output, where a server has sampled.
    """

    proposal_logprobs: list[float] | None = None
    rescored_logprobs: list[float] | None = None
    policy_logprobs: list[float] | None = None
    prior_logprobs: list[float] | None = None
    policy_steps: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class RewardedGroup(SampledGroup):
    """A sampled group with a reward for each output; one that is not finite leaves the output out of the weights."""

    rewards: list[float]


@dataclass(frozen=True, kw_only=True)
class ScoredGroup(Group):
    """A group with all that an objective asks for; ``policy_logprobs`` are log q when the group was scored."""

    rewards: list[float]
    prior_logprobs: list[float]
    proposal_logprobs: list[float]
    policy_logprobs: list[float]
    policy_steps: list[int] | None = None


@dataclass(frozen=True)
class Rollout:
    """The groups of one iteration."""

    iteration: int
    groups: Sequence[Group]


AnyGroup = TypeVar("AnyGroup", bound=Group)


def rewarded(group: SampledGroup, rewards: list[float]) -> RewardedGroup:
    """The group with these rewards, in the outputs' order."""
    return RewardedGroup(**{**_fields(group), "rewards": rewards})


def output_matrix(groups: Sequence[Group], name: str) -> torch.Tensor:
    """A field with one number per output (``rewards``, ``prior_logprobs``, ...), [G, N] float64; zero where a group has
    no such output."""
    matrix_GN = torch.zeros(len(groups), max(len(group.outputs) for group in groups), dtype=torch.float64)
    for g, group in enumerate(groups):
        values = getattr(group, name)
        matrix_GN[g, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return matrix_GN


def as_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups as JSON values, whatever their stage."""
    return [dataclasses.asdict(group) for group in groups]


def from_json(items: Sequence[dict[str, Any]], stage: type[AnyGroup]) -> list[AnyGroup]:
    """The inverse of ``as_json`` for groups of one stage."""
    return [
        stage(
            **{
                **item,
                "prompt": Prompt(**item["prompt"]),
                "outputs": [Output(**output) for output in item["outputs"]],
            }
        )
        for item in items
    ]


def _fields(group: Group) -> dict[str, Any]:
    return {item.name: getattr(group, item.name) for item in dataclasses.fields(group)}
