"""SteerLM 2.0 (Wang et al. 2024, arXiv:2406.08673, section 4.5): BRAIn's gradient, per token of a group's outputs."""

from __future__ import annotations

import torch

from nemo_brain.objectives.base import LogWeights, ObjectiveInputs
from nemo_brain.objectives.brain import Brain
from nemo_brain.objectives.registry import register


@register("steerlm2")
class SteerLM2(Brain):
    """BRAIn's loss, divided by the mean number of tokens of the group's outputs that count.

    Args: as in ``Brain``; SteerLM 2.0's goodness is ``beta``.
    """

    def loss(self, inputs: ObjectiveInputs, weights: LogWeights) -> torch.Tensor:
        if inputs.lengths_GN is None:
            raise ValueError("objective steerlm2 needs the outputs' lengths")
        return super().loss(inputs, weights) / inputs.mean(inputs.lengths_GN).clamp(min=1.0)
