"""Which law an output was drawn from: its sampler's log-prob beside the one that the training kernels compute.

Two kernels differ by rounding; another law differs by more, and by the more the longer the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_brain.core.groups import SampledGroup

# What one output may differ by, in units of what all may on average: those of few tokens scatter most.
OUTLIER = 10.0


def output_gaps(group: SampledGroup, ours: Sequence[float]) -> list[float]:
    """Of each output, |log q' here - log q' by its sampler| in nats per token."""
    assert group.proposal_logprobs is not None
    return [
        abs(value - theirs) / len(output.token_ids)
        for value, theirs, output in zip(ours, group.proposal_logprobs, group.outputs, strict=True)
    ]


def gap_per_token(groups: Sequence[SampledGroup], ours: Sequence[Sequence[float]]) -> float:
    """Their mean over the tokens of all outputs."""
    total, tokens = 0.0, 0
    for group, values in zip(groups, ours, strict=True):
        for gap, output in zip(output_gaps(group, values[: len(group.outputs)]), group.outputs, strict=True):
            total += gap * len(output.token_ids)
            tokens += len(output.token_ids)
    return total / tokens


def repeated_gap(before: Sequence[SampledGroup], again: Sequence[SampledGroup]) -> float:
    """``gap_per_token`` between a sampler's two answers to the same requests, over the outputs that have come again;
    infinite where none has. Rounding may change an output, but hardly all of them."""
    pairs = [(a, b) for a, b in zip(before, again, strict=True) if _tokens(a) == _tokens(b)]
    if not pairs:
        return math.inf
    first, second = zip(*pairs, strict=True)
    return gap_per_token(first, [group.proposal_logprobs for group in second])


def _tokens(group: SampledGroup) -> list[list[int]]:
    return [output.token_ids for output in group.outputs]


def diagnosis(raw: bool, start: bool) -> str:
    """What it means that a server's log-probs are not the model's.

    Args:
        raw: they are the model's at temperature 1, though another law is sampled.
        start: they are the start model's.
    """
    if raw:
        return (
            "it gives the model's log-probs at temperature 1 for those of the law that it samples from: start it so "
            "that it gives the latter (vLLM: --logprobs-mode processed_logprobs)"
        )
    if start:
        return (
            "it has the start model's weights: it was started again and given no new ones, or "
            "rollout.remote.reload does not reach it"
        )
    return (
        "it has other weights than the ranks: another model or another run's, a reload that left some as they were "
        "(vLLM on a CPU a tied output layer: docs/remote_sampling.md), prefixes kept from older weights, a server that "
        "gives log-probs of another law, or one that computes in a lower precision than the ranks, for which "
        "rollout.max_proposal_gap has to be larger"
    )
