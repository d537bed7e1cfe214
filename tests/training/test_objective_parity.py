"""Every objective of the package equals one process in each kind of layout: its loss and all gradients, of one and the
same step of a run in which prior, proposal and policy are three models."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from layouts import PP2, SP, TP2, VIRTUAL
from parity import RELATIVE, RUN
from ranks import run_ranks
from toy_runs import full_gradients, recorded_run

from nemo_brain.objectives import OBJECTIVES, make_objective
from nemo_brain.training.brain.passes import BRAInPasses

GAMMA = {"gamma": 0.2}
# Every one, with each of its variants that computes something else.
FAMILY: dict[str, dict] = {
    "brain": {"name": "brain", **GAMMA},
    "brain, sigmoid": {"name": "brain", **GAMMA, "goodness": "sigmoid", "goodness_center": 0.3},
    "brain, beta": {"name": "brain", "goodness": "beta", "goodness_center": 0.5, "gamma": 1.0},
    "snis": {"name": "snis", **GAMMA},
    **{
        f"{name}, z={z}": {"name": name, **GAMMA, "z": z}
        for name in ("dpg", "gdc", "gdc++")
        for z in ("group", "prompt")
    },
    "dpg, z=known": {"name": "dpg", **GAMMA, "z": "known"},
    **{
        f"f_brain, {kind}": {"name": "f_brain", **GAMMA, "divergence": kind}
        for kind in ("kl", "reverse_kl", "js", "tv")
    },
    "log_variance": {"name": "log_variance", **GAMMA},
    "steerlm2": {"name": "steerlm2", **GAMMA},
    "rloo": {"name": "rloo", **GAMMA},
    "rebel": {"name": "rebel", "eta": 1.0},
    "infonca": {"name": "infonca", "tau": 0.1, "beta": 0.5},
    "nca": {"name": "nca", "tau": 0.1, "beta": 0.5},
    **{
        f"rpo, {kind}": {"name": "rpo", "beta": 0.5, "eta": 1.0, "variant": kind} for kind in ("bwd_kl", "fwd_kl", "sq")
    },
    "ipo": {"name": "ipo", "beta": 0.5, "pairs": "all"},
    "dpo, best_worst": {"name": "dpo", "beta": 0.5, "pairs": "best_worst"},
    "dpo, all": {"name": "dpo", "beta": 0.5, "pairs": "all"},
    "dpo_sft": {"name": "dpo_sft", "beta": 0.5},
    "hinge": {"name": "hinge", "beta": 0.5},
    "slic": {"name": "slic", "delta": 1.0, "regulariser": 0.1},
}
LAYOUTS = {
    "TP2, sequence parallel": [TP2, SP],
    "TP2, two pass": [TP2, "train.micro_batch_tokens=64"],
    "PP2": [PP2],
    "PP2, 2 virtual stages, two pass": [PP2, VIRTUAL, "train.micro_batch_tokens=64"],
    "DP2": [],
    "DP2, two pass, distributed optimizer": ["train.micro_batch_tokens=64", "optim.use_distributed_optimizer=true"],
}
STEP = 4  # the second of the second iteration


Measured = dict[str, tuple[float, dict[str, torch.Tensor]]]  # loss and gradients by objective


def measured(*overrides: str) -> Measured:
    """One rank's view of a run with BRAIn, in whose step STEP each objective has a turn: loss and gradients."""
    found: Measured = {}
    train, steps = BRAInPasses.train, []

    def every(self, chunks, groups, scores, objective, *known):
        steps.append(1)
        for name, options in FAMILY.items() if len(steps) == STEP else ():
            with tempfile.TemporaryDirectory() as scratch:
                if options.get("z") == "known":
                    log_z = Path(scratch, "log_z.json")
                    log_z.write_text(json.dumps({prompt: 0.1 for prompt in scores.prompt_ids}))
                    options = {**options, "log_z": str(log_z)}
                result = train(self, chunks, groups, scores, make_objective(**options))
            found[name] = result.loss, full_gradients(chunks)
            for chunk in chunks:
                chunk.zero_grad_buffer()
        return train(self, chunks, groups, scores, objective, *known)

    BRAInPasses.train = every
    recorded_run(*RUN, "data.holdout=0", *overrides)
    return found


@functools.cache
def one_process() -> Measured:
    (found,) = run_ranks(measured, 1)
    return found


def test_every_objective_is_among_them_and_has_a_gradient():
    assert {options["name"] for options in FAMILY.values()} == set(OBJECTIVES)
    found = one_process()
    assert found.keys() == FAMILY.keys()
    for name, (_, gradients) in found.items():
        assert sum(gradient.norm() for gradient in gradients.values()) > 1e-3, name


def compare(expected: Measured, ranks: list[Measured], name: str) -> None:
    """An objective's loss and gradients on these ranks with the expected ones."""
    loss, gradients = expected[name]
    seen = set()
    for rank in ranks:
        ours, theirs = rank[name]
        assert ours == pytest.approx(loss, rel=RELATIVE, abs=1e-7), name
        for tensor, gradient in theirs.items():
            error = (gradient - gradients[tensor]).norm() / gradients[tensor].norm()
            assert error < RELATIVE, (name, tensor, float(error))
            seen.add(tensor)
    assert seen == gradients.keys(), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout):
    ranks = run_ranks(measured, 2, *LAYOUTS[layout])
    for name in FAMILY:
        compare(one_process(), ranks, name)


def test_the_comparison_can_fail():
    other = run_ranks(measured, 1, "seed=1")
    for name in FAMILY:
        with pytest.raises(AssertionError):
            compare(one_process(), other, name)
