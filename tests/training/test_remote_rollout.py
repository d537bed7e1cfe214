"""Runs that sample from an inference server (tests/completion_server.py), in several layouts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from completion_server import END, VOCAB, CompletionServer, save_model
from layouts import PP2, TP2
from ranks import run_ranks
from remote_runs import RUN, remote
from toy_runs import recorded_run
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture
def server(tmp_path):
    # Its first weights are another model's: what it samples from is what the run gives it.
    with CompletionServer(save_model(tmp_path / "other", VOCAB, END)) as running:
        yield running


def by_group(server: CompletionServer, **changes) -> list[str]:
    """``remote`` without a directory: over a process group."""
    return remote(server, Path(), transfer="process_group", export_to="null", reload="null", **changes)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["prior.placement=offload", "rollout.rescore_proposal=false"]),
        (2, [PP2]),
        (4, [TP2, "model.peft={dim: 8}", "prior.placement=adapter_off", "optim.lr=0.1"]),
    ],
    ids=["one process, prior offloaded, the server's log-probs", "PP2", "TP2 x DP2, adapters"],
)
def test_a_server_samples_from_each_refreshed_policy(server, tmp_path, ranks, overrides):
    """What the server says of its outputs is what the policy of that iteration says: it got the new weights."""
    result, *_ = run_ranks(recorded_run, ranks, *RUN, *remote(server, tmp_path), *overrides)
    # Before the first validation and after each iteration's steps; what is unchanged is not loaded again.
    assert len(server.loads) == 3
    assert all(record["refresh_seconds"] > 0 for record in result["metrics"] if record["kind"] == "iteration")
    iterations = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert [record["iteration"] for record in iterations] == [0, 1]
    for record in iterations:
        # Sums of 8 log-probs in fp32, computed twice. Other weights differ by whole nats (below).
        assert record.get("proposal_gap", 0.0) < 1e-4
        assert (record["kl_to_prior"] == pytest.approx(0, abs=1e-4)) == (record["iteration"] == 0)
    steps = [record for record in result["metrics"] if record["kind"] == "step"]
    assert len(steps) == 4 * 2 and all(record["grad_norm"] > 0 for record in steps)
    final = [record for record in result["metrics"] if record["kind"] == "eval"][-1]
    # Of four outputs, so of either sign; zero to rounding where the policy still is the prior.
    assert abs(final["eval/kl_to_prior"]) > 0.05


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (2, [PP2]),
        (4, [TP2, "model.peft={dim: 8, target_modules: [linear_qkv, linear_fc1]}", "optim.lr=0.1"]),
    ],
    ids=["one process", "PP2", "TP2 x DP2, adapters"],
)
def test_each_policy_goes_to_the_servers_workers_over_a_process_group(tmp_path, ranks, overrides):
    """With adapters all of it once, then the layers that have one, whole."""
    with CompletionServer(another(start_model(tmp_path))) as server:
        result, *_ = run_ranks(recorded_run, ranks, *RUN, *by_group(server), *overrides)
    iterations = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert len(server.received) == 3 and not server.loads
    first, *later = server.received
    assert first == {name: parameter.nbytes for name, parameter in server.model.named_parameters()}
    adapted = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    touched = [name for name in first if ranks < 4 or name.split(".")[-2] in adapted]
    assert [sorted(names) for names in later] == [sorted(touched)] * 2
    for record in iterations:
        assert record["proposal_gap"] < 1e-4
        assert (record["kl_to_prior"] == pytest.approx(0, abs=1e-4)) == (record["iteration"] == 0)
    # The first iteration's weights have come for the validation before it.
    assert [record["refresh_bytes"] for record in iterations] == [0, sum(later[0].values())]
    assert iterations[1]["refresh_bytes_per_second"] > 0


def recorded_by_client(server: CompletionServer, *overrides: str) -> dict:
    """``recorded_run`` in a fork of the server's process, in which the server is not, so that it can end."""
    server.http.socket.close()
    return recorded_run(*overrides)


AHEAD = ["rollout.ahead=1", "rollout.rescore_proposal=false"]


@pytest.mark.parametrize(
    ("ranks", "layout", "transfers"),
    [(1, [], 4), (4, [PP2], 4), (2, [PP2, *AHEAD], 2)],  # ahead, it may be lost just before it is given weights anyway
    ids=["one process", "PP2 x DP2", "PP2, sampling ahead"],
)
def test_a_server_that_comes_back_while_it_samples_is_given_the_weights_by_all_ranks(
    tmp_path, ranks, layout, transfers
):
    """Its requests wait for that, and each replica gives them by itself."""
    with CompletionServer(another(start_model(tmp_path))) as server:
        losses = [38, 55]  # requests after which it is lost: of a probe, of what is trained on

        def lose(body) -> None:
            if losses and len(server.bodies) >= losses[0]:
                losses.pop(0)
                server.kill()
                threading.Timer(0.5, server.restart).start()

        server.before = lose
        run = (*RUN, *by_group(server), "data.holdout=0", *layout)
        result, *_ = run_ranks(recorded_by_client, ranks, server, *run)
    assert (
        not losses
        and len(server.received) >= transfers
        and all(received == server.received[0] for received in server.received)
    )
    iterations = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert len(iterations) == 2 and all(record.get("proposal_gap", 0) < 1e-4 for record in iterations)


def fails(match: str, server: CompletionServer, tmp_path, *overrides: str, **keys) -> None:
    """The run ends with this, and has trained on nothing since."""
    with pytest.raises(AssertionError, match=match):
        run_ranks(recorded_run, 1, *RUN, *remote(server, tmp_path, **keys), "data.holdout=0", *overrides)


def test_a_server_that_has_the_weights_of_another_model_ends_the_run(server, tmp_path):
    unchanged = {"export_to": "null", "reload": "null"}
    match = r"away from those of the policy \(rollout\.max_proposal_gap is 0\.001\): it has other weights"
    fails(match, server, tmp_path, "trainer.max_iterations=1", **unchanged)


def another(model: Path) -> Path:
    """A model of the same kind with other weights, in its place."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    return model


def start_model(tmp_path) -> Path:
    """What the runs of this module start from, whose output layer is tied."""
    export = f"model.export_to={tmp_path}/start"
    run_ranks(recorded_run, 1, *RUN, export, "trainer.max_iterations=1", "optim.lr=1e-20", "data.holdout=0")
    return tmp_path / "start"


def test_a_reload_that_leaves_the_tied_output_layer_as_it_was_ends_the_run(tmp_path):
    stale = "[{path: /collective_rpc, json: {method: reload_weights, kwargs: {weights_path: '{path}'}}},"
    stale += "{path: /reset_prefix_cache}]"
    with CompletionServer(start_model(tmp_path)) as server:
        fails(r"away from those of the policy .*a reload that left some as they were", server, tmp_path, reload=stale)
        assert len(server.loads) == 2, "the start model's was right"


def test_a_reload_that_does_not_reach_the_server_ends_the_run(server, tmp_path):
    """It gets the start model, and nothing after that."""
    load = server.load
    server.load = lambda path: load(path) if not server.loads[1:] else None
    match = r"away from those of the policy .*: it has the start model's weights"
    fails(match, server, tmp_path, "rollout.outputs_per_prompt=2", "rollout.prompts_per_iteration=4")


def test_log_probs_at_temperature_1_for_those_of_the_sampled_law_end_the_run(server, tmp_path):
    match = r"it gives the model's log-probs at temperature 1 .*--logprobs-mode processed_logprobs"
    fails(match, server, tmp_path, "rollout.temperature=0.6", logprobs="sampled")


def other_logprobs(choice: dict) -> None:
    """Those of other tokens than the sampled."""
    values = choice["logprobs"]["token_logprobs"]
    choice["logprobs"]["token_logprobs"] = [value - 1.0 for value in values]


def other_ids(choice: dict) -> None:
    choice["token_ids"] = [(token + 1) % 200 for token in choice["token_ids"]]


@pytest.mark.parametrize("change", [other_logprobs, other_ids])
def test_outputs_whose_log_probs_are_not_the_policys_are_drawn_again(server, tmp_path, change):
    lies: list[dict] = []

    def lie(answer) -> None:
        """Three times; about an output without an end, whose absence would be seen without its log-probs."""
        if len(lies) < 3 and answer["choices"][0]["finish_reason"] == "length":
            lies.append(answer)
            change(answer["choices"][0])

    server.fault = lambda attempt, body: lie if server.place(body) > 4 and body["max_tokens"] == 8 else None
    once = ("trainer.max_iterations=1", "data.holdout=0", "rollout.max_new_tokens=8")
    result, *_ = run_ranks(recorded_run, 1, *RUN, *remote(server, tmp_path), *once)
    (record,) = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert record["proposal_gap"] < 1e-4
    assert len({body["seed"] for body in server.bodies}) == 4 + 8 * 4 + 3, "a probe's, all, and three anew"


def test_a_server_that_always_lies_ends_the_run(server, tmp_path):
    """Of the outputs that are trained on: a probe's are as they should be."""
    server.fault = lambda attempt, body: (
        (lambda answer: other_logprobs(answer["choices"][0])) if server.place(body) > 4 else None
    )
    fails(r"4 outputs in a row whose log-probs are not those of the model", server, tmp_path)


def test_outputs_of_another_law_are_kept_with_the_servers_log_probs(server, tmp_path):
    """The server is lost after the probe and comes back with its first weights, which is what samples, as it says."""
    server.versions = False

    def stale(body) -> None:
        if server.place(body) == 5:
            server.load(server._first)
            server._cache.clear()

    server.before = stale
    keep = remote(server, tmp_path, on_mismatch="keep", concurrency=1)
    once = ("trainer.max_iterations=1", "data.holdout=0", "rollout.save=true")
    result, *_ = run_ranks(recorded_run, 1, *RUN, *keep, *once)
    (record,) = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert record["proposal_gap"] < 1e-2 and len(server.loads) == 1
    assert len(server.bodies) == 4 + 8 * 4, "nothing is drawn again"
    # At the first iteration the policy is the prior: what differs is the law that has sampled.
    assert record["kl_to_prior"] == pytest.approx(0, abs=1e-4)


def test_a_server_samples_from_the_start_model_that_is_not_refreshed(server, tmp_path):
    """Its outputs are held to the prior; the policy's own ranks sample for validations."""
    never = ("rollout.refresh=never", "objective.name=infonca", "objective.gamma=null", "objective.tau=0.1")
    never += ("objective.beta=1",)
    start = ("rollout.temperature=0.8", *never)
    kept = remote(server, tmp_path, export_to="null", reload="null", logprobs="sampled")
    with pytest.raises(AssertionError, match=r"away from those of the start model.*it has other weights"):
        run_ranks(recorded_run, 1, *RUN, *kept, *start)
    with CompletionServer(start_model(tmp_path), processed=True) as right:
        kept = remote(right, tmp_path, export_to="null", reload="null", logprobs="sampled")
        result, *_ = run_ranks(recorded_run, 1, *RUN, *kept, *start)
        assert all(body["temperature"] == 0.8 for body in right.bodies)
    gaps = [record["proposal_gap"] for record in result["metrics"] if record["kind"] == "iteration"]
    assert len(gaps) == 2 and max(gaps) < 1e-4


ADAPTIVE = ("rollout.refresh=kl_adaptive", "objective.name=gdc++", "trainer.max_iterations=4", "optim.lr=3e-3")


@pytest.mark.parametrize("ranks, placement", [(1, "resident"), (2, "offload")], ids=["one process", "PP2, offloaded"])
def test_a_server_gets_the_proposal_when_that_changes_and_is_held_to_it(server, tmp_path, ranks, placement):
    """The policy's own ranks sample for validations."""
    layout = (f"prior.placement={placement}", *[PP2] * (ranks - 1))
    result, *_ = run_ranks(recorded_run, ranks, *RUN, *ADAPTIVE, *layout, *remote(server, tmp_path))
    iterations = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert max(record["proposal_gap"] for record in iterations) < 1e-4
    nearer = [record["kl_target_policy"] < record["kl_target_proposal"] for record in iterations]
    assert 0 < sum(nearer[:3]) < 3
    assert len(server.loads) == 1 + sum(nearer[:3]), "the start model, and each that sampled"


def test_a_server_that_keeps_the_start_model_for_a_proposal_ends_the_run(server, tmp_path):
    load = server.load
    server.load = lambda path: load(path) if not server.loads[1:] else None
    match = r"away from those of the proposal .*: it has the start model's weights"
    fails(match, server, tmp_path, *ADAPTIVE, "data.holdout=4")


def test_a_server_that_fails_ends_every_rank_with_its_error(server, tmp_path):
    """The second replica's requests are answered; its ranks must not wait for the first's in vain."""

    server.fault = lambda attempt, body: 400 if any(body is failed for failed in server.bodies[8:9]) else None
    with pytest.raises(AssertionError, match=r"ValueError: rollout\.remote: http.*prompt .*HTTP 400"):
        run_ranks(recorded_run, 4, *RUN, *remote(server, tmp_path), PP2, "data.holdout=0")


def test_a_model_that_cannot_be_exported_is_refused_before_it_starts(server, tmp_path):
    with pytest.raises(AssertionError, match=r"rollout\.remote\.export_to"):
        run_ranks(
            recorded_run, 1, *RUN, *remote(server, tmp_path), "model.gpt.position_embedding_type=learned_absolute"
        )
    assert not server.bodies
