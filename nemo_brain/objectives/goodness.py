"""Goodness models: log p(G=1 | y, x), up to a constant within a group, as a function of (r - center) / gamma.

They only enter alpha, which is held constant: no gradient goes through them.

Shapes: G groups (prompts), N outputs per group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from nemo_brain.host.send import sent
from nemo_brain.objectives.registry import register

_END = 1e-3  # how near a score comes to 0 and 1, where its law degenerates
_RATINGS = 24  # a + b of the law that a score stands for
_NODES = 64  # of the integral over its upper half: exact to 2e-14
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
    scores_GN = (scaled_rewards_GN.detach().double() + 0.5).clamp(_END, 1 - _END)
    rare_GN = _log_upper_half(torch.minimum(scores_GN, 1 - scores_GN))
    good_GN = torch.where(scores_GN <= 0.5, rare_GN, torch.log1p(-rare_GN.exp()))
    return good_GN.to(scaled_rewards_GN.dtype)


def _log_upper_half(scores_GN: torch.Tensor) -> torch.Tensor:
    """log of the chance that Beta(24 s, 24 - 24 s) exceeds 1/2, for s up to 1/2, where its density is smooth there."""
    logs_K, complements_K, weights_K = _upper_half(scores_GN.device)
    a_GN = _RATINGS * scores_GN
    b_GN = _RATINGS - a_GN
    densities_GNK = (a_GN[..., None] - 1) * logs_K + (b_GN[..., None] - 1) * complements_K
    mass_GN = (weights_K + densities_GNK).logsumexp(dim=-1)
    return mass_GN + torch.lgamma(a_GN + b_GN) - torch.lgamma(a_GN) - torch.lgamma(b_GN)


@functools.lru_cache(maxsize=8)
def _upper_half(device: torch.device) -> tuple[torch.Tensor, ...]:
    """log t, log(1 - t) and log w of Gauss's nodes t within [1/2, 1] and their weights w, float64 [K]."""
    nodes_K, weights_K = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(_NODES))
    places_K = 0.75 + nodes_K / 4
    logs = (places_K.log(), torch.log1p(-places_K), (weights_K / 4).log())
    return tuple(sent(values_K, device) for values_K in logs)
