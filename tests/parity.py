"""Runs of the toy in any layout, and the comparison of one with another: outputs, metrics and gradients."""

from __future__ import annotations

import json

import pytest
from layouts import TIMINGS

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


def compare(expected: dict, ranks: list[dict], records: int = 8) -> None:
    actual = ranks[0]
    assert texts(actual["samples"]) == texts(expected["samples"])
    assert len(actual["metrics"]) == len(expected["metrics"]) == records
    for ours, theirs in zip(actual["metrics"], expected["metrics"], strict=True):
        # The layouts differ in how many positions they compute, and the gap is rounding error itself.
        for name in theirs.keys() - {"tokens", "proposal_gap"}:
            if name.endswith(TIMINGS):
                continue
            if isinstance(theirs[name], float):
                absolute = KL_NATS if "kl_" in name and "prior" in name else 1e-7
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


LEARNED = (
    "model.gpt.position_embedding_type=learned_absolute",
    "model.gpt.normalization=LayerNorm",
    "model.gpt.gated_linear_unit=false",
    "model.gpt.add_bias_linear=true",
    "model.gpt.num_query_groups=4",
    "model.gpt.share_embeddings_and_output_weights=false",
)
