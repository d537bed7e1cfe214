"""Objectives in whole runs, also those that are no part of the package: equal in every layout, and their state."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from layouts import TP2
from parity import RELATIVE, RUN, compare
from ranks import run_ranks
from toy_runs import recorded_run

# One group per step, so that two data-parallel ranks have half of its outputs each.
SPLIT = (*RUN, "train.global_batch_size=1", "rollout.prompts_per_iteration=2", "objective.name=null")
LAYOUTS = {
    "TP2, two pass": (2, [TP2, "train.micro_batch_tokens=1"]),
    "DP2, groups split over the ranks": (2, []),
}
DPG = ("objective._target_=plug_ins.RunningDPG", "objective.gamma=0.1")
OBJECTIVES = {
    "GDC++": ("objective._target_=plug_ins.GDCPlusPlus",),
    "running DPG": DPG,
    "running DPG of another decay": (*DPG, "+objective.decay=0.9"),
}


class States(pl.Callback):
    """The objective's state after each step."""

    def __init__(self):
        self.steps: list[dict] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps.append(module.objective.state_dict())


def run_with_states(*overrides: str) -> dict:
    states = States()
    return {**recorded_run(*SPLIT, *overrides, callbacks=[states]), "states": states.steps}


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict]:
    return {name: run_ranks(run_with_states, 1, *overrides)[0] for name, overrides in OBJECTIVES.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["GDC++", "running DPG"])
def test_layout_equals_one_process(name, layout, one_process):
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(run_with_states, world_size, *OBJECTIVES[name], *overrides)
    compare(one_process[name], ranks)
    assert all(rank["states"] == ranks[0]["states"] for rank in ranks)  # bit for bit
    for ours, theirs in zip(ranks[0]["states"], one_process[name]["states"], strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE)


def test_state_advances_once_per_step_and_reaches_the_next(one_process):
    run, other = one_process["running DPG"], one_process["running DPG of another decay"]
    assert [state["steps"] for state in run["states"]] == [1, 2, 3, 4]
    assert len({state["z"] for state in run["states"]}) == 4
    differences = [
        max((gradient - theirs[name]).norm().item() / gradient.norm().item() for name, gradient in ours.items())
        for ours, theirs in zip(run["gradients"], other["gradients"], strict=True)
    ]
    assert differences[0] == 0 and differences[1] > 0.1


def test_a_z_for_each_prompt_is_the_same_in_one_process():
    objective = ("objective.name=gdc++", "objective.z=prompt")
    one, two = (run_ranks(run_with_states, ranks, *objective) for ranks in (1, 2))
    compare(one[0], two)
    assert two[0]["states"] == two[1]["states"]
    for ours, theirs in zip(two[0]["states"], one[0]["states"], strict=True):
        assert ours.keys() == theirs.keys() and ours
        for prompt, seen in ours.items():
            assert seen == pytest.approx(theirs[prompt], rel=RELATIVE)
