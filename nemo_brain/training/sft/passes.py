"""Supervised fine-tuning on completions through Megatron's schedules: the mean cross-entropy of their tokens.

Shapes: G groups of the global batch, each with one output, the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nemo_brain.core.groups import Group
from nemo_brain.core.packing import MicroBatch, chunk_tokens
from nemo_brain.model.passes import GroupPasses


@dataclass
class CompletionResult:
    """A training pass's outcome before the step, the same on every rank: the loss in nats per token of the completions,
    the number of these tokens, and of the row positions that it took (over all ranks, without padding)."""

    loss: float
    completion_tokens: int
    tokens: int


class CompletionPasses(GroupPasses):
    """``GroupPasses`` that train on the completions. The loss is a sum over tokens, so one pass is enough."""

    def train(self, chunks: Sequence[torch.nn.Module], groups: Sequence[Group]) -> CompletionResult:
        """Accumulates the gradient of the mean loss over the completions' tokens into the chunks' gradient buffers."""
        planned = self._plan(groups)
        count = completion_tokens(groups)
        # Megatron averages over micro-batches and data-parallel ranks; ours is a mean over the tokens of the batch.
        scale = len(planned.ranks[0]) * len(planned.ranks) / count
        results = self._run(chunks, planned, groups, (1.0,), _CompletionLoss(scale))
        logprobs_G = self._collect(results, planned, groups, 1)[0, :, 0]
        tokens = sum(chunk_tokens(group, (0,), self.layout) for group in groups)
        return CompletionResult(-logprobs_G.sum().item() / count, count, tokens)

    def loss(
        self, chunks: Sequence[torch.nn.Module], groups: Sequence[Group], on_tokens: Callable[[int], None]
    ) -> float:
        """The mean loss over the completions' tokens, without gradients; see ``logprobs``."""
        return -self.logprobs(chunks, groups, on_tokens=on_tokens).sum().item() / completion_tokens(groups)


def completion_tokens(groups: Sequence[Group]) -> int:
    return sum(len(group.outputs[0].token_ids) for group in groups)


@dataclass
class _CompletionLoss:
    """The loss of a micro-batch, and its outputs' log-probs [1, K]."""

    scale: float

    def __call__(self, batch: MicroBatch, logprobs_1T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_K = batch.output_sums(logprobs_1T[0].double())
        return -logprobs_K.sum() * self.scale, logprobs_K.detach()[None]
