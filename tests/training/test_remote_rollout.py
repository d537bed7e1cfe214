"""Runs that sample from an inference server (tests/completion_server.py), in several layouts."""

from __future__ import annotations

import pytest
from completion_server import END, VOCAB, CompletionServer, save_model
from layouts import PP2, TP2
from ranks import run_ranks
from toy_runs import recorded_run

RUN = (
    "trainer.max_iterations=2",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=4",
    "train.micro_batch_tokens=64",
    "data.holdout=4",
    "optim.lr=3e-2",
)


@pytest.fixture
def server(tmp_path):
    # Its first weights are another model's: what it samples from is what the run gives it.
    with CompletionServer(save_model(tmp_path / "other", VOCAB, END)) as running:
        yield running


def remote(server: CompletionServer, tmp_path, **changes) -> list[str]:
    reload = "[{path: /collective_rpc, json: {method: nemo_brain_load, kwargs: {path: '{path}'}}},"
    reload += "{path: /reset_prefix_cache}]"
    keys = {
        "url": server.url,
        "model": "policy",
        "concurrency": 4,
        "timeout_seconds": 30,
        "request_timeout_seconds": 20,
        "export_to": tmp_path / "policy",
        "reload": reload,
        **changes,
    }
    return ["rollout.remote={" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"]


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


def test_a_server_with_other_weights_is_seen_in_the_proposal_gap(server, tmp_path):
    unchanged = remote(server, tmp_path, export_to="null", reload="null")
    result, *_ = run_ranks(recorded_run, 1, *RUN, *unchanged, "trainer.max_iterations=1", "data.holdout=0")
    (record,) = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert record["proposal_gap"] > 1


def test_a_server_that_fails_ends_every_rank_with_its_error(server, tmp_path):
    """The second replica's requests are answered; its ranks must not wait for the first's in vain."""

    server.fault = lambda attempt, body: 400 if body is server.bodies[4] else None
    with pytest.raises(AssertionError, match=r"ValueError: rollout\.remote: http.*prompt .*HTTP 400"):
        run_ranks(recorded_run, 4, *RUN, *remote(server, tmp_path), PP2, "data.holdout=0")


def test_a_model_that_cannot_be_exported_is_refused_before_it_starts(server, tmp_path):
    with pytest.raises(AssertionError, match=r"rollout\.remote\.export_to"):
        run_ranks(
            recorded_run, 1, *RUN, *remote(server, tmp_path), "model.gpt.position_embedding_type=learned_absolute"
        )
    assert not server.bodies
