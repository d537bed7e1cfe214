"""Goodness models: log p(G=1 | y, x), up to a constant within a group, as a function of (r - center) / gamma.

They only enter alpha, which is held constant: no gradient goes through them.

Shapes: G groups (prompts), N outputs per group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincc

from nemo_brain.objectives.registry import register

_END = 1e-3  # how near a score comes to 0 and 1, where its law degenerates
GOODNESS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}


@register("bradley_terry", GOODNESS)
def bradley_terry(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """The odds of two outputs differ by exp((r_1 - r_2) / gamma): the posterior is PPO's optimal policy."""
    return scaled_rewards_GN


@register("sigmoid", GOODNESS)
def sigmoid(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """A calibrated probability sigmoid((r - center) / gamma), which saturates for rewards far above the center."""
    return F.logsigmoid(scaled_rewards_GN)


@register("beta", GOODNESS)
def beta(scaled_rewards_GN: torch.Tensor) -> torch.Tensor:
    """A score in [0, 1] stands for the law Beta(24 s, 24 - 24 s) of what is good, as in SteerLM 2.0: the output is good
    where that exceeds 1/2. ``center`` is the middle of the rewards' range and ``gamma`` its width, s the reward's place
    in it; rewards beyond count as those at its ends.
    """
    scores_GN = (scaled_rewards_GN.detach().cpu().numpy() + 0.5).clip(_END, 1 - _END)
    good_GN = np.log(betaincc(24 * scores_GN, 24 - 24 * scores_GN, 0.5))
    return torch.from_numpy(good_GN).to(scaled_rewards_GN)
