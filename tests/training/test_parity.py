"""Every parallel layout equals one process: the sampled outputs, and the loss, gradient norm, all gradients and metrics
of 4 steps over 2 iterations (with the weights changed in between by Adam, and the outputs sampled anew)."""

from __future__ import annotations

import functools

import pytest
import torch
from layouts import PP2, SP, TP2, VIRTUAL, cases
from parity import LEARNED, RUN, compare
from ranks import run_ranks
from toy_runs import recorded_run

LAYOUTS = {
    "one process, full recompute": (1, ["model.recompute=full"]),
    "one process, selective recompute": (1, ["model.recompute=selective"]),
    "one process, separate rows": (1, ["train.layout=separate_rows"]),
    "one process, one row per micro-batch (two pass)": (1, ["train.micro_batch_tokens=1"]),
    "one process, separate rows one by one (two pass)": (
        1,
        ["train.micro_batch_tokens=1", "train.layout=separate_rows"],
    ),
    "one process, everything in one micro-batch": (1, ["train.micro_batch_tokens=100000"]),
    "one process, prior offloaded": (1, ["prior.placement=offload"]),
    "TP2": (2, [TP2]),
    "PP2": (2, [PP2]),
    "DP2": (2, []),
    "DP2, two pass": (2, ["train.micro_batch_tokens=1"]),
    "DP2, distributed optimizer": (2, ["optim.use_distributed_optimizer=true"]),
    "DP2, reduction after the backward pass": (2, ["ddp.overlap_grad_reduce=false"]),
    "DP2, two pass, distributed optimizer, everything overlapped in small buckets": (
        2,
        [
            "optim.use_distributed_optimizer=true",
            "ddp.overlap_param_gather=true",
            "+ddp.bucket_size=4000",
            "train.micro_batch_tokens=64",
            "prior.placement=offload",
        ],
    ),
    "TP2, sequence parallel": (2, [TP2, SP]),
    "TP2, sequence parallel, full recompute, two pass": (
        2,
        [TP2, SP, "model.recompute=full", "train.micro_batch_tokens=64"],
    ),
    "PP2, 2 virtual stages": (2, [PP2, VIRTUAL]),
    "PP2, full recompute": (2, [PP2, "model.recompute=full", "train.micro_batch_tokens=64"]),
    "PP2, prior offloaded, separate rows": (2, [PP2, "prior.placement=offload", "train.layout=separate_rows"]),
    "TP2 x PP2": (4, [TP2, PP2]),
    "TP2 x PP2, sequence parallel, 2 virtual stages, full recompute": (
        4,
        [TP2, PP2, SP, VIRTUAL, "model.recompute=full"],
    ),
    "DP4": (4, []),
    "PP2 x DP2": (4, [PP2]),
    "TP2 x DP2, distributed optimizer": (4, [TP2, "optim.use_distributed_optimizer=true"]),
}


@functools.cache
def reference(*overrides: str) -> dict:
    (result,) = run_ranks(recorded_run, 1, *overrides)
    return result


# One of each kind.
KINDS = ("TP2", "PP2", "DP2", "DP2, distributed optimizer", "TP2, sequence parallel", "PP2, 2 virtual stages")


@pytest.mark.parametrize("layout", cases(LAYOUTS, *KINDS))
def test_layout_equals_one_process(layout):
    world_size, overrides = LAYOUTS[layout]
    compare(reference(*RUN), run_ranks(recorded_run, world_size, *RUN, *overrides))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, ["train.layout=separate_rows"]), (2, [TP2, SP]), (2, [PP2, VIRTUAL]), (4, [TP2, PP2, "model.recompute=full"])],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_learned_positions_equal_one_process(world_size, overrides):
    """A model like GPT-2, with an output layer of its own."""
    compare(reference(*RUN, *LEARNED), run_ranks(recorded_run, world_size, *RUN, *LEARNED, *overrides))


@pytest.mark.parametrize("overrides", [[], ["train.layout=separate_rows"]], ids=["shared prefix", "separate rows"])
def test_groups_spread_over_data_parallel_ranks_equal_groups_on_one(overrides):
    """With one group per step and two ranks each rank has half of the group's outputs."""
    batch = ["train.global_batch_size=1", "rollout.prompts_per_iteration=2"]
    compare(reference(*RUN, *batch), run_ranks(recorded_run, 2, *RUN, *batch, *overrides))


def test_sampling_temperature_and_masking_do_not_depend_on_the_layout():
    options = [
        "rollout.temperature=1.3",
        "rollout.truncated=mask",
        # Enough outputs end by themselves to leave groups with several.
        "rollout.outputs_per_prompt=16",
        "rollout.max_new_tokens=32",
    ]
    compare(reference(*RUN, *options), run_ranks(recorded_run, 2, *RUN, *options, TP2, "train.micro_batch_tokens=128"))


def test_outputs_that_end_while_prompts_are_still_admitted_equal_all_at_once():
    """A budget of one or two prompts a pass, and so many outputs that some end in each."""
    outputs = ["rollout.outputs_per_prompt=32"]
    compare(reference(*RUN, *outputs), run_ranks(recorded_run, 1, *RUN, *outputs, "train.micro_batch_tokens=40"))


def test_the_comparison_can_fail():
    """Another seed's run differs from the reference in outputs and gradients, so parity is no accident."""
    other = reference(*RUN, "seed=1")
    with pytest.raises(AssertionError):
        compare(reference(*RUN), [other])
    first, second = (run["gradients"][0] for run in (reference(*RUN), other))
    assert all(torch.dist(first[name], second[name]) > 0.01 * first[name].norm() for name in first)
