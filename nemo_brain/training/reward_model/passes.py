"""Bradley-Terry training of a reward model on preference pairs, through Megatron's schedules.

Shapes: P pairs of the global batch; a pair is a group of two outputs, the chosen one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nemo_brain.core.groups import Group
from nemo_brain.core.packing import MicroBatch, chunk_tokens
from nemo_brain.host.send import sent
from nemo_brain.model.reward_passes import RewardPasses, lengthened


def preference_losses(rewards_P2: torch.Tensor, margins_P: torch.Tensor, centering: float) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) + centering (r_chosen + r_rejected)^2 of each pair: [P].

    The margin is Llama 2's (Touvron et al. 2023, equation 2); the second term keeps rewards around zero, which the
    first leaves free (Eisenstein et al. 2023, equation 2; TRL's ``center_rewards_coefficient``).
    """
    chosen_P, rejected_P = rewards_P2.unbind(-1)
    return F.softplus(margins_P - (chosen_P - rejected_P)) + centering * (chosen_P + rejected_P) ** 2


@dataclass
class PreferenceResult:
    """A training pass's outcome before the step, the same on every rank: rewards [P, 2], losses [P] (float64), and the
    number of row positions that it took (over all ranks, without padding)."""

    rewards_P2: torch.Tensor
    losses_P: torch.Tensor
    tokens: int

    @property
    def loss(self) -> float:
        return self.losses_P.mean().item()


class PreferencePasses(RewardPasses):
    """``RewardPasses`` that train. Every pair lies in one micro-batch, so one pass is enough."""

    def train(
        self, chunks: Sequence[torch.nn.Module], pairs: Sequence[Group], margins_P: torch.Tensor, centering: float
    ) -> PreferenceResult:
        """Accumulates the gradient of the mean loss over the pairs into the chunks' gradient buffers."""
        pairs = lengthened(pairs)
        planned = self._plan(pairs, split=False)
        # Megatron averages over micro-batches and data-parallel ranks; ours is a mean over the pairs of the batch.
        scale = len(planned.ranks[0]) * len(planned.ranks) / len(pairs)
        results = self._run(chunks, planned, pairs, (1.0,), _PreferenceLoss(margins_P, centering, scale))
        rewards_P2 = self._collect(results, planned, pairs, 1)[0]
        tokens = sum(chunk_tokens(pair, (0, 1), self.layout) for pair in pairs)
        return PreferenceResult(rewards_P2, preference_losses(rewards_P2, margins_P, centering), tokens)


@dataclass
class _PreferenceLoss:
    """The loss of a micro-batch, and its rewards [1, K]."""

    margins_P: torch.Tensor
    centering: float
    scale: float

    def __call__(self, batch: MicroBatch, rewards_1K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rewards_P2 = rewards_1K[0].double().view(len(batch.rows) // 2, 2)
        margins_P = sent(self.margins_P[[pair for pair, _ in batch.rows[::2]]], rewards_P2.device)
        losses_P = preference_losses(rewards_P2, margins_P, self.centering)
        return losses_P.sum() * self.scale, rewards_P2.detach().view(1, -1)
