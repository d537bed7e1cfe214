"""Every parallel layout equals one process: the sampled outputs, and the loss, gradient norm, all gradients and metrics
of 4 steps over 2 iterations (with the weights changed in between by Adam, and the outputs sampled anew)."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from ranks import run_ranks
from toy_runs import recorded_run

# fp32; sums over ranks and micro-batches are taken in different orders. Measured: at most 4e-6.
RELATIVE = 1e-5
# kl_to_prior is a difference of log-probs of about 45 nats, of which fp32 holds 4e-6.
KL_NATS = 2e-5

RUN = (
    "trainer.max_iterations=2",
    "trainer.val_every_iterations=2",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=4",
    "train.epochs_per_iteration=1",
    "data.holdout=4",
    # Adam divides by the gradient's size: a larger epsilon keeps rounding errors of tiny gradients tiny.
    "optim.adam_eps=1e-3",
)
TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VIRTUAL = "model.virtual_pipeline_model_parallel_size=2"
SP = "model.sequence_parallel=true"
TIMINGS = ("_seconds", "tokens_per_second", "peak_memory_gib")

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
        [TP2, SP, "model.recompute=full", "train.micro_batch_tokens=1"],
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


def compare(expected: dict, ranks: list[dict]) -> None:
    actual = ranks[0]
    assert texts(actual["samples"]) == texts(expected["samples"])
    assert len(actual["metrics"]) == len(expected["metrics"]) == 8
    for ours, theirs in zip(actual["metrics"], expected["metrics"], strict=True):
        # The layouts differ in how many positions they compute, and the gap is rounding error itself.
        for name in theirs.keys() - {"tokens", "proposal_gap"}:
            if name.endswith(TIMINGS):
                continue
            if isinstance(theirs[name], float):
                absolute = KL_NATS if "kl_to_prior" in name else 1e-7
                assert ours[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=absolute), (theirs["step"], name)
            else:
                assert ours[name] == theirs[name], (theirs["step"], name)
    for step, full in enumerate(expected["gradients"]):
        seen = set()
        for rank in ranks:
            for name, gradient in rank["gradients"][step].items():
                error = (gradient - full[name]).norm() / full[name].norm()
                assert error < RELATIVE, (step, name, float(error))
                seen.add(name)
        assert seen == full.keys()


def texts(samples: str) -> list:
    """Prompts and outputs; their weights are compared as metrics are, with tolerance."""
    records = [json.loads(line) for line in samples.splitlines()]
    return [(r["id"], r["kind"], [output["text"] for output in r["outputs"]]) for r in records]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout):
    world_size, overrides = LAYOUTS[layout]
    compare(reference(*RUN), run_ranks(recorded_run, world_size, *RUN, *overrides))


LEARNED = (
    "model.gpt.position_embedding_type=learned_absolute",
    "model.gpt.normalization=LayerNorm",
    "model.gpt.gated_linear_unit=false",
    "model.gpt.add_bias_linear=true",
    "model.gpt.num_query_groups=4",
    "model.gpt.share_embeddings_and_output_weights=false",
)


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
    compare(reference(*RUN, *options), run_ranks(recorded_run, 2, *RUN, *options, TP2, "train.micro_batch_tokens=1"))


def test_the_comparison_can_fail():
    """Another seed's run differs from the reference in outputs and gradients, so parity is no accident."""
    other = reference(*RUN, "seed=1")
    with pytest.raises(AssertionError):
        compare(reference(*RUN), [other])
    first, second = (run["gradients"][0] for run in (reference(*RUN), other))
    assert all(torch.dist(first[name], second[name]) > 0.01 * first[name].norm() for name in first)
