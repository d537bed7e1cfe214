"""Passes over groups through a reward model: the same rows as a policy's, the prompt computed once.

Shapes: G groups, N outputs per group, K outputs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nemo_brain.core.groups import Group
from nemo_brain.core.packing import Chunk, MicroBatch
from nemo_brain.model.passes import GroupPasses


class RewardPasses(GroupPasses):
    """Passes over groups through ``RewardGPTModel`` chunks: the same rows as a policy's, the prompt computed once."""

    def rewards(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Sequence[Group],
        on_tokens: Callable[[int], None] = lambda tokens: None,
        alone: bool = False,
    ) -> torch.Tensor:
        """Rewards [G, N] (float64, on every rank; zero where a group has no such output): see ``logprobs``."""
        return self.logprobs(chunks, lengthened(groups), on_tokens=on_tokens, alone=alone)[0]

    def _pack(self, groups: Sequence[Group], chunks: Sequence[Chunk]) -> MicroBatch:
        """The row with one target per output, the last."""
        batch = super()._pack(groups, chunks)
        last_K = torch.bincount(batch.output_of_target_T, minlength=len(batch.rows)).cumsum(0) - 1
        return replace(
            batch,
            target_positions_T=batch.target_positions_T[last_K],
            targets_T=batch.targets_T[last_K],
            output_of_target_T=torch.arange(len(batch.rows)),
        )


def lengthened(groups: Sequence[Group]) -> list[Group]:
    """The groups with one token more per output: rows hold the tokens that predict, here those of the whole output."""
    return [
        replace(group, outputs=[replace(output, token_ids=[*output.token_ids, 0]) for output in group.outputs])
        for group in groups
    ]
