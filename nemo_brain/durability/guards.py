"""What keeps a run from going on with non-finite numbers, or with weights that say nothing."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from nemo_brain.core.groups import Group, ScoredGroup, as_json


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """One group per line, with all scores."""
    path.write_text("".join(json.dumps(item) + "\n" for item in as_json(groups)), encoding="utf-8")


def nonfinite_rewards(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups in which an output's reward is not finite."""
    return [group for group in groups if not all(map(math.isfinite, group.rewards))]


def nonfinite_message(step: int) -> str:
    return (
        f"the gradient of step {step} is not finite; the weights are those before it, its groups are in "
        f"run_dir/nonfinite_step_{step}.jsonl. Lower optim.lr, or leave such steps out with train.on_nonfinite=skip"
    )


def warn_of_collapse(ess_alpha: float, bound: float, outputs: int) -> None:
    """Warns where the weights of an iteration's groups rest on hardly more than one output each."""
    if ess_alpha < bound:
        warnings.warn(
            f"the posterior's weights rest on {ess_alpha:.2f} of {outputs} outputs per group (effective sample size, "
            f"train.min_ess={bound:g}): raise objective.gamma or rollout.outputs_per_prompt",
            stacklevel=2,
        )
