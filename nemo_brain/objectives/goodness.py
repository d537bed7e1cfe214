"""Goodness models: log p(G=1 | y, x), up to a constant within a group, as a function of (r - center) / gamma.

Shapes: G groups (prompts), N outputs per group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from nemo_brain.objectives.registry import register

GOODNESS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}


@register("bradley_terry", GOODNESS)
def bradley_terry(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """The odds of two outputs differ by exp((r_1 - r_2) / gamma): the posterior is PPO's optimal policy."""
    return scaled_rewards_GN


@register("sigmoid", GOODNESS)
def sigmoid(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """A calibrated probability sigmoid((r - center) / gamma), which saturates for rewards far above the center."""
    return F.logsigmoid(scaled_rewards_GN)
