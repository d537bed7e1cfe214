"""Proposals that are not refreshed at each iteration: the start model's, or the policy's of an earlier iteration; their
log-probs are the proposal's, in every layout, wherever the prior is, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import resumed_runs
from layouts import PP2, TP2, VIRTUAL
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


ADAPTIVE = ("rollout.refresh=kl_adaptive", "objective.name=gdc++", "rollout.outputs_per_prompt=8")


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("adaptive")
    train(run_dir, "trainer.max_iterations=6", "rollout.save=true", *ADAPTIVE)
    return run_dir


def test_the_proposal_is_refreshed_where_the_policy_is_nearer_to_the_target(adaptive):
    """What it then is, its log-probs say: on the outputs of an iteration they are the policy's of the one before, where
    that was nearer, and the prior's before the first time."""
    groups = [json.loads(line) for line in (adaptive / "rollouts.jsonl").read_text().splitlines()]
    iterations = records(adaptive, "iteration")
    nearer = [record["kl_target_policy"] < record["kl_target_proposal"] for record in iterations]
    assert not nearer[0] and any(nearer[1:]), "the policy is the prior at first"
    assert iterations[0]["kl_target_policy"] == iterations[0]["kl_target_proposal"] > 0
    moved = False
    for iteration, record in enumerate(iterations):
        scored = [o for g in groups if g["iteration"] == iteration for o in g["outputs"]]
        of_prior = [o["proposal_logprob"] == pytest.approx(o["prior_logprob"], abs=1e-4) for o in scored]
        assert all(of_prior) if not moved else not all(of_prior)
        assert record["proposal_gap"] < 1e-4  # rescored by the very weights that sampled
        moved = moved or nearer[iteration]


OFFLOAD = "prior.placement=offload"
LORA = ("model.peft={dim: 4}", "optim.lr=3e-2")


def trained(run_dir: Path, *overrides: str) -> tuple[list[dict], list[dict]]:
    """All outputs with their log-probs, and what each iteration's record says of the proposal."""
    train(run_dir, "trainer.max_iterations=6", "rollout.save=true", *ADAPTIVE, *overrides)
    return outputs(run_dir), [record["kl_target_proposal"] for record in records(run_dir, "iteration")]


def test_an_offloaded_proposal_is_the_resident_one_to_the_last_bit(adaptive, tmp_path):
    resident = outputs(adaptive), [record["kl_target_proposal"] for record in records(adaptive, "iteration")]
    assert trained(tmp_path, OFFLOAD) == resident


def test_with_adapters_the_proposal_is_another_set_of_them_wherever_the_prior_is(tmp_path):
    placements = ("resident", "offload", "adapter_off")
    first, *others = (trained(tmp_path / where, *LORA, f"prior.placement={where}") for where in placements)
    assert any(abs(o["proposal_logprob"] - o["prior_logprob"]) > 1e-3 for o in first[0]), "one has been taken"
    assert others == [first, first]


def test_where_it_is_asked_less_often_it_changes_less_often(adaptive, tmp_path):
    train(tmp_path, "trainer.max_iterations=6", *ADAPTIVE, "rollout.refresh_every=4")
    asked = ["kl_target_policy" in record for record in records(tmp_path, "iteration")]
    assert asked == [True, False, False, False, True, False]


@pytest.mark.parametrize(
    "layout",
    [[TP2], [PP2], [PP2, VIRTUAL], [], [TP2, OFFLOAD], [PP2, OFFLOAD]],
    ids=["TP2", "PP2", "PP2, virtual stages", "DP2", "TP2, offloaded", "PP2, offloaded"],
)
def test_an_adaptive_proposal_is_the_same_in_every_layout(layout):
    # Four iterations, so that a refreshed one samples.
    several = (*RUN, *ADAPTIVE, "rollout.prompts_per_iteration=4", "trainer.max_iterations=4")
    one, two = (run_ranks(recorded_run, ranks, *several, *(layout * (ranks - 1))) for ranks in (1, 2))
    compare(one[0], two, records=11)


@pytest.mark.parametrize(
    "step, first, other",
    [(7, [], []), (9, [], []), (9, [], [TP2]), (9, [OFFLOAD], [OFFLOAD]), (9, [OFFLOAD], [TP2])],
    ids=["in 7", "in 9", "in 9, on as TP2", "offloaded", "offloaded, on as TP2 beside the policy"],
)
def test_an_adaptive_run_that_goes_on_has_the_proposal_that_it_had(tmp_path, step, first, other):
    options = (*ADAPTIVE, "optim.sched=null", "optim.lr=1e-3", "seed=2")
    expected, _ = resumed_runs.undisturbed(*options)
    kinds = [r for r in expected if r["kind"] == "iteration"]
    assert kinds[1]["kl_target_policy"] < kinds[1]["kl_target_proposal"], "the third iteration has another proposal"
    assert run_ranks(resumed_runs.train, 1, str(tmp_path), *options, *first, stop_after=step) == ["signal SIGTERM"]
    ranks = 1 + (TP2 in other)
    assert run_ranks(resumed_runs.train, ranks, str(tmp_path), *options, *other) == ["finished"] * ranks
    resumed_runs.compare(tmp_path, expected, tolerance=1e-5 if TP2 in other else 0)


@pytest.mark.parametrize("other", [[], [PP2]], ids=["as it was", "on as PP2"])
def test_an_adaptive_run_with_adapters_that_goes_on_has_those_that_it_had(tmp_path, other):
    options = (*ADAPTIVE, *LORA, "optim.lr=1e-2", "prior.placement=adapter_off", "optim.sched=null", "seed=2")
    expected, _ = resumed_runs.undisturbed(*options)
    kinds = [r for r in expected if r["kind"] == "iteration"]
    assert kinds[1]["kl_target_policy"] < kinds[1]["kl_target_proposal"], "the third iteration has another proposal"
    assert run_ranks(resumed_runs.train, 1, str(tmp_path), *options, stop_after=9) == ["signal SIGTERM"]
    ranks = 1 + len(other)
    assert run_ranks(resumed_runs.train, ranks, str(tmp_path), *options, *other) == ["finished"] * ranks
    resumed_runs.compare(tmp_path, expected, tolerance=1e-5 if other else 0)


REMOTE = "rollout.remote={url: 'http://127.0.0.1:1', model: policy%s}"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.refresh=kl_adaptive", "rollout.rescore_proposal=false"], "set rollout.rescore_proposal=true"),
        (["rollout.refresh=kl_adaptive", REMOTE % ""], r"set rollout\.remote\.reload and rollout\.remote\.export_to"),
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
