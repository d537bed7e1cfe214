"""A server samples iterations ahead of the training that they are for (``rollout.ahead``)."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from completion_server import END, VOCAB, CompletionServer, save_model
from layouts import PP2, TP2
from ranks import run_ranks
from remote_runs import RELOAD, RUN, remote
from resumed_runs import train
from toy_runs import toy_config

from nemo_brain.config.brain import check
from nemo_brain.report.metrics import read_metrics

ONCE = ("data.holdout=0", "rollout.save=true", "rollout.rescore_proposal=false")
STEPS = 4  # optimizer steps of an iteration: 8 prompts, 4 groups a step, two epochs


@pytest.fixture
def server(tmp_path):
    with CompletionServer(save_model(tmp_path / "other", VOCAB, END)) as running:
        yield running


def ahead(server: CompletionServer, tmp_path, count: int, *overrides: str, **keys) -> list[str]:
    return [*RUN, *remote(server, tmp_path, reload=RELOAD, **keys), *ONCE, f"rollout.ahead={count}", *overrides]


def finished(run_dir: Path, ranks: int, *overrides: str) -> list[dict]:
    """The run's iterations."""
    assert set(run_ranks(train, ranks, str(run_dir), *overrides)) == {"finished"}
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "iteration"]


def groups_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]


@torch.no_grad()
def logprobs(model, group: dict, output: dict) -> list[float]:
    prompt, tokens = group["prompt_token_ids"], output["token_ids"]
    rows = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def drawn_by(server: CompletionServer, group: dict, output: dict) -> set[int]:
    """The optimizer steps of the policies whose log-prob the output has: of all its tokens, or of its first ones, and
    a later policy's of the others. fp32 and 8 tokens; a policy of some steps more is 1e-2 away."""
    found = set()
    models = {int(version.partition(":")[0].rpartition("-")[2]): model for version, model in server.named.items()}
    values = {step: logprobs(model, group, output) for step, model in models.items()}
    for first, early in values.items():
        for last, late in values.items():
            sums = [math.fsum(early[:t] + late[t:]) for t in range(len(early) + 1)]
            if last >= first and min(abs(value - output["proposal_logprob"]) for value in sums) < 1e-4:
                found.add(first)
    return found


@pytest.mark.parametrize(
    ("ranks", "count", "overrides"),
    [(1, 1, ()), (2, 2, (PP2,)), (4, 1, (TP2, "model.peft={dim: 8}", "prior.placement=adapter_off", "optim.lr=0.1"))],
    ids=["one process", "PP2, two ahead", "TP2 x DP2, adapters"],
)
def test_outputs_come_with_the_log_probs_of_the_weights_that_drew_them(server, tmp_path, ranks, count, overrides):
    options = ahead(server, tmp_path, count, "trainer.max_iterations=4", *overrides)
    iterations = finished(tmp_path / "run", ranks, *options)
    groups = groups_of(tmp_path / "run")
    assert [record["iteration"] for record in iterations] == [0, 1, 2, 3] and len(groups) == 4 * 8
    for record in iterations:
        outputs = [
            (group, output)
            for group in groups
            if group["iteration"] == record["iteration"]
            for output in group["outputs"]
        ]
        lags = [STEPS * record["iteration"] - output["policy_step"] for _, output in outputs]
        assert record["ahead/steps"] == pytest.approx(sum(lags) / len(lags)) and record["ahead/wait_seconds"] >= 0
        assert min(lags) >= 0 and max(lags) <= count * STEPS
        for group, output in outputs:
            assert output["policy_step"] in drawn_by(server, group, output)
    first, *others = iterations
    assert first["ahead/steps"] == 0 and abs(first["ahead/kl"]) < 1e-4
    assert all(record["ahead/steps"] > 0 for record in others), "begun while the iteration before was trained on"
    assert all(abs(record["ahead/kl"]) > 1e-3 for record in others), "the policy has moved on since"


def test_the_ranks_train_while_the_server_samples(server, tmp_path):
    """No output of the second iteration is drawn before the first one's last step has been made."""
    path, waited = tmp_path / "run" / "metrics.jsonl", threading.Event()

    def before(body) -> None:
        if len(server.bodies) > 4 + 8 * 4:  # a probe's, and the first iteration's
            ended = time.monotonic() + 10
            while f'"step": {STEPS}' not in path.read_text() and time.monotonic() < ended:
                time.sleep(0.02)
            assert time.monotonic() < ended
            waited.set()

    server.before = before
    finished(tmp_path / "run", 1, *ahead(server, tmp_path, 1))
    assert waited.is_set()


def test_a_server_that_is_started_again_meanwhile_draws_its_outputs_again(server, tmp_path):
    """It comes back with its first weights, and answers before anybody has seen it."""
    ended = threading.Event()

    def before(body) -> None:
        if len(server.bodies) > 45 and not ended.is_set():
            ended.set()
            server.load(server._first)
            server.version = "default"
            server._cache.clear()

    server.before = before
    finished(tmp_path / "run", 1, *ahead(server, tmp_path, 1, "trainer.max_iterations=3"))
    assert ended.is_set()
    for group in groups_of(tmp_path / "run"):
        for output in group["outputs"]:
            assert output["policy_step"] in drawn_by(server, group, output)


def test_weights_that_change_under_the_name_that_they_have_end_the_run(server, tmp_path):
    changed = threading.Event()

    def before(body) -> None:
        if len(server.bodies) > 50 and not changed.is_set():
            changed.set()
            server.load(server._first)
            server._cache.clear()

    server.before = before
    with pytest.raises(AssertionError, match=r"its weights were changed under the name that they had"):
        finished(tmp_path / "run", 1, *ahead(server, tmp_path, 1, "trainer.max_iterations=3"))


def test_a_server_that_keeps_no_names_is_refused(server, tmp_path):
    server.versions = False
    with pytest.raises(AssertionError, match=r"rollout\.ahead: http.* does not say which weights it has.*VLLM_SERVER"):
        finished(tmp_path / "run", 1, *ahead(server, tmp_path, 1))


def test_a_server_that_fails_ends_the_run_and_nothing_is_lost(server, tmp_path):
    """Whatever was sampled of the iteration is in a file."""
    server.fault = lambda attempt, body: 400 if server.place(body) == 50 else None
    with pytest.raises(AssertionError, match=r"prompt .*HTTP 400.*failed_rollout\.jsonl"):
        finished(tmp_path / "run", 2, *ahead(server, tmp_path, 1, PP2))
    assert (tmp_path / "run" / "failed_rollout.jsonl").exists()


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_that_is_stopped_goes_on_and_samples_again_what_was_under_way(server, tmp_path, step):
    options = ahead(server, tmp_path, 2, "trainer.max_iterations=4")
    (reason,) = run_ranks(train, 1, str(tmp_path / "run"), *options, stop_after=step)
    assert "SIGTERM" in reason
    iterations = finished(tmp_path / "run", 1, *options, "checkpoint.resume=auto")
    assert [record["iteration"] for record in iterations] == [0, 1, 2, 3]
    groups = groups_of(tmp_path / "run")
    assert [group["iteration"] for group in groups] == [k for k in range(4) for _ in range(8)]
    for group in groups:
        for output in group["outputs"]:
            assert output["policy_step"] in drawn_by(server, group, output)


REMOTE = "rollout.remote={url: 'http://127.0.0.1:8000', model: policy, export_to: /x, reload: [{path: /load}]}"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["rollout.rescore_proposal=false"], r"rollout\.ahead .* needs rollout\.remote with reload"),
        ([REMOTE], r"rollout\.rescore_proposal cannot compute their log q': set it to false"),
        ([REMOTE, "data.rollouts=x", "data.train=null"], r"and no data\.rollouts"),
    ],
)
def test_configurations_that_cannot_work_are_refused(overrides, match):
    with pytest.raises(ValueError, match=match):
        check(toy_config("rollout.ahead=1", *overrides))
