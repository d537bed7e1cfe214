"""Proposals that are not refreshed: the start model samples, its log-probs are the proposal's, in every layout and
wherever the prior is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import resumed_runs
from layouts import PP2, TP2
from parity import RUN, compare
from ranks import run_ranks
from small_runs import records, train
from toy_runs import recorded_run, toy_config

from nemo_brain.config.brain import check
from nemo_brain.report.metrics import read_samples

NEVER = ("rollout.refresh=never", "objective.name=infonca", "objective.gamma=null", "objective.tau=0.1")
NEVER += ("objective.beta=1",)
SEVERAL = ("trainer.max_iterations=3", "rollout.save=true", "optim.lr=3e-2")


def outputs(run_dir: Path) -> list[dict]:
    """Of all groups that were trained on, in order."""
    groups = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    return [{"id": group["id"], **output} for group in groups for output in group["outputs"]]


@pytest.fixture(scope="module")
def never(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("never")
    train(run_dir, *SEVERAL, *NEVER)
    return run_dir


def test_the_start_model_samples_though_the_policy_has_moved(never, tmp_path):
    train(tmp_path, *SEVERAL, "optim.lr=1e-20")  # whose policy stays the start model
    ours, theirs = outputs(never), outputs(tmp_path)
    assert [(o["id"], o["text"]) for o in ours] == [(o["id"], o["text"]) for o in theirs]
    assert len({o["text"] for o in ours}) > 20
    final = {s["id"]: s["outputs"] for s in read_samples(never / "samples.jsonl") if s["kind"] == "final"}
    start = {s["id"]: s["outputs"] for s in read_samples(never / "samples.jsonl") if s["kind"] == "start"}
    assert final != start  # validations are the policy's


def test_its_log_probs_are_the_proposals(never):
    for output in outputs(never):
        assert output["proposal_logprob"] == output["prior_logprob"]
    iterations = records(never, "iteration")
    assert all(record["proposal_gap"] < 1e-4 and "kl_to_prior" not in record for record in iterations)
    # Of the first iteration the policy is the prior; then it moves away from it.
    distances = [record["kl_from_prior"] for record in iterations]
    assert distances[0] == 0 and distances[2] > 0.05


def test_at_another_temperature_they_are_the_priors_at_it(tmp_path):
    hot = ("rollout.temperature=1.4", *SEVERAL, *NEVER)
    train(tmp_path / "rescored", *hot)
    train(tmp_path / "sampled", *hot, "rollout.rescore_proposal=false")
    rescored, sampled = outputs(tmp_path / "rescored"), outputs(tmp_path / "sampled")
    for ours, theirs in zip(rescored, sampled, strict=True):
        assert ours["text"] == theirs["text"]
        # The sampler's own kernels: sums of 8 log-probs in fp32.
        assert ours["proposal_logprob"] == pytest.approx(theirs["proposal_logprob"], abs=1e-4)
        assert abs(ours["proposal_logprob"] - ours["prior_logprob"]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [["prior.placement=offload"], ["model.peft={dim: 4}", "prior.placement=adapter_off"]],
    ids=["offload", "adapter_off"],
)
def test_wherever_the_prior_is_the_outputs_are_the_same(never, tmp_path, options):
    train(tmp_path, *SEVERAL, *NEVER, *options)
    ours, theirs = outputs(tmp_path), outputs(never)
    assert [(o["text"], o["prior_logprob"]) for o in ours] == [(o["text"], o["prior_logprob"]) for o in theirs]


@pytest.mark.parametrize(
    "layout", [[TP2, "train.micro_batch_tokens=1"], [PP2], []], ids=["TP2, two pass", "PP2", "DP2"]
)
def test_layout_equals_one_process(layout):
    one, two = (run_ranks(recorded_run, ranks, *RUN, *NEVER, *(layout * (ranks - 1))) for ranks in (1, 2))
    compare(one[0], two)


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_goes_on_is_the_undisturbed_one(tmp_path, step):
    expected, files = resumed_runs.undisturbed(*NEVER)
    (stopped,) = run_ranks(resumed_runs.train, 1, str(tmp_path), *NEVER, stop_after=step)
    assert stopped == "signal SIGTERM"
    assert run_ranks(resumed_runs.train, 1, str(tmp_path), *NEVER) == ["finished"]
    resumed_runs.compare(tmp_path, expected, tolerance=0)
    assert resumed_runs.written(tmp_path) == files


REMOTE = "rollout.remote={url: 'http://127.0.0.1:1', model: policy%s}"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.refresh=sometimes"], "rollout.refresh must be .*always.*never"),
        (
            ["rollout.refresh=never", "data.train=null", "data.rollouts=x.jsonl"],
            "rollout.refresh says what samples, and with data.rollouts nothing does",
        ),
        (
            ["rollout.refresh=never", REMOTE % ", export_to: x, reload: [{path: /reload}]"],
            r"rollout\.refresh=never samples from the start model, with which the server is started: set",
        ),
    ],
)
def test_what_contradicts_it_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(toy_config(*overrides))


def test_a_server_that_keeps_its_weights_will_do():
    check(toy_config("rollout.refresh=never", REMOTE % ""))
    with pytest.raises(ValueError, match="the server keeps its first weights"):
        check(toy_config(REMOTE % ""))
