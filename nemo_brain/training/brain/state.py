"""Where a BRAIn run stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_brain.core.groups import ScoredGroup, as_json, from_json
from nemo_brain.objectives import Objective
from nemo_brain.training.frame import State


@dataclass
class BRAInState(State):
    """rollout: the scored groups of the iteration under way, with its record so far; [] between iterations. start: the
    start model's held-out groups, and what the prompts' reference answers earn. validated: iterations before the last
    validation. refreshed: the iteration whose policy a kl_adaptive proposal is; 0: the start model. objective: its own
    state is part of the run's."""

    objective: Objective = field(kw_only=True)
    rollout: list[ScoredGroup] = field(default_factory=list)
    record: dict[str, float] = field(default_factory=dict)
    start: list[ScoredGroup] = field(default_factory=list)
    reference_rewards: list[float | None] | None = None
    validated: int = 0
    refreshed: int = 0

    def as_json(self) -> dict[str, Any]:
        groups = {"rollout": as_json(self.rollout), "start": as_json(self.start)}
        return {**super().as_json(), **groups, "objective": self.objective.state_dict()}

    def load_json(self, values: Mapping[str, Any]) -> None:
        groups = {name: from_json(values[name], ScoredGroup) for name in ("rollout", "start")}
        self.objective.load_state_dict(values["objective"])
        super().load_json({**values, **groups, "objective": self.objective})
