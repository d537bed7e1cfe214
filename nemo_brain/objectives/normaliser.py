"""Z, the target's normaliser: alpha / Z are the weights of methods that do not normalise over the group.

Shapes: G groups (prompts), N outputs per group.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from nemo_brain.host.send import sent
from nemo_brain.objectives.base import ObjectiveInputs

KINDS = ("group", "prompt", "known")
# Weights are exact up to this; above it exp goes on as its tangent, so that its gradient stays finite.
MAX_WEIGHT = 1e6


class Normaliser:
    """log Z of each group.

    Args:
        z: ``group``: the mean of alpha over the group's outputs; ``prompt``: over all outputs of the prompt so far,
            this group's among them; ``known``: as ``log_z`` says.
        log_z: with ``known``, a JSON file of an object {prompt id: log Z}.

    Raises:
        ValueError: an option's value cannot be used; names it.
    """

    def __init__(self, z: str, log_z: str | None):
        if z not in KINDS:
            raise ValueError(f"unknown objective.z {z!r}; known: {', '.join(KINDS)}")
        if (z == "known") != (log_z is not None):
            raise ValueError("objective.log_z (a JSON file of log Z by prompt id) and objective.z=known go together")
        self._kind = z
        self._known = {} if log_z is None else _read(log_z)
        self._seen: dict[str, tuple[float, int]] = {}  # by prompt: log of the sum of alpha, and of how many outputs

    def log_z(self, inputs: ObjectiveInputs, log_alpha_GN: torch.Tensor) -> torch.Tensor:
        """[G]. ValueError: the prompts are not known."""
        if self._kind == "known":
            values = [self._value(name) for name in _names(inputs)]
            return sent(torch.tensor(values, dtype=torch.float64), log_alpha_GN.device)
        log_sum_G, count_G = _log_sum(inputs, log_alpha_GN), inputs.kept_GN.sum(-1)
        if self._kind == "prompt":
            before = [self._seen.get(name, (-math.inf, 0)) for name in _names(inputs)]
            before_G2 = sent(torch.tensor(before, dtype=torch.float64), log_alpha_GN.device)
            log_before_G, count_before_G = before_G2.unbind(-1)
            log_sum_G, count_G = torch.logaddexp(log_sum_G, log_before_G), count_G + count_before_G
        return log_sum_G - count_G.double().log()

    def update(self, inputs: ObjectiveInputs, log_alpha_GN: torch.Tensor) -> None:
        """The groups have been used once."""
        if self._kind != "prompt":
            return
        sums, counts = _log_sum(inputs, log_alpha_GN).tolist(), inputs.kept_GN.sum(-1).tolist()
        for name, log_sum, count in zip(_names(inputs), sums, counts, strict=True):
            log_before, before = self._seen.get(name, (-math.inf, 0))
            high = max(log_before, log_sum)
            together = high + math.log(math.exp(log_before - high) + math.exp(log_sum - high))
            self._seen[name] = (together, before + count)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = {name: (log_sum, count) for name, (log_sum, count) in state.items()}

    def _value(self, name: str) -> float:
        if name not in self._known:
            raise ValueError(f"objective.log_z has no log Z of the prompt {name!r}: add it, or set objective.z=group")
        return self._known[name]


def capped_exp(log_weights_GN: torch.Tensor) -> torch.Tensor:
    """exp up to ``MAX_WEIGHT``, its tangent there above: convex, increasing, finite with its gradient."""
    top = math.log(MAX_WEIGHT)
    return log_weights_GN.clamp(max=top).exp() + MAX_WEIGHT * (log_weights_GN - top).clamp(min=0.0)


def _log_sum(inputs: ObjectiveInputs, log_alpha_GN: torch.Tensor) -> torch.Tensor:
    return log_alpha_GN.masked_fill(~inputs.kept_GN, -torch.inf).logsumexp(-1)


def _names(inputs: ObjectiveInputs) -> list[str]:
    if inputs.prompt_ids is None:
        raise ValueError("objective.z=prompt and z=known need the prompts' ids: use objective.z=group")
    return list(inputs.prompt_ids)


def _read(path: str) -> dict[str, float]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"objective.log_z: {path} cannot be read: {error}") from error
    numbers = isinstance(found, dict) and all(type(v) in (int, float) and math.isfinite(v) for v in found.values())
    if not numbers:
        raise ValueError(f"objective.log_z: {path} must hold one JSON object of prompt ids and finite numbers")
    return found
