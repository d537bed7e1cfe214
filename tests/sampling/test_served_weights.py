"""Which weights an inference server has: new ones for it, and what it draws once it has others, or is lost.

The server is tests/completion_server.py: a real HTTP server on this machine with a real model.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from completion_server import END, TOKENIZER, VOCAB, CompletionServer, save_model
from models import LLAMA_LIKE, ONE, exported_logits
from ranks import run_ranks
from remote_samplers import OPTIONS, PROMPTS, RELOAD, finished, sampled, sampler, teacher_forced, tokens_of
from transformers import AutoModelForCausalLM

from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.sampling import pool as pool_module
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_refresh_loads_the_exported_model(directory, tmp_path):
    """From Megatron's chunks by ``export_model`` into the server, whose outputs then have the new model's log-probs."""
    run_ranks(exported_logits, 1, LLAMA_LIKE, ONE, tmp_path / "policy")
    note = [
        sys.executable,
        "-c",
        "import sys; open(sys.argv[1], 'w').write(sys.argv[2])",
        str(tmp_path / "note"),
        "{path}",
    ]

    with CompletionServer(directory) as server:
        before = sampled(sampler(server))
        remote = sampler(server, reload=[*RELOAD, {"command": note}], directory=tmp_path / "policy", version="1")
        assert remote.refresh(reload=False) == [server.url]
        after = sampled(remote)
        assert are_of(before, directory) and are_of(after, tmp_path / "policy")
        assert min(errors(after, directory)) > 1e-2, "the other model is told apart"
        assert (tmp_path / "note").read_text() == str(tmp_path / "policy")


def iteration_of_a_rank(url: str, target: Path) -> list[tuple[int, SampledGroup]]:
    """What a rank of two data-parallel replicas does in an iteration: export, reload, its share of the prompts."""
    exported_logits(LLAMA_LIKE, ONE, target)
    rank = dist.get_rank()
    remote = sampler(url, reload=RELOAD, directory=target, version="1")
    if rank == 0:
        remote.refresh(reload=True)
    dist.barrier()
    share = PROMPTS[rank::2]
    return [(2 * index + rank, group) for index, group in finished(remote, share)]


def test_ranks_share_a_server(directory, tmp_path):
    with CompletionServer(directory) as server:
        shares = run_ranks(iteration_of_a_rank, 2, server.url, tmp_path / "policy")
        groups = [group for _, group in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])]
        assert tokens_of(groups) == tokens_of(sampled(sampler(server)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    (logprob, *_), (output, *_) = groups[0].proposal_logprobs, groups[0].outputs
    assert abs(logprob - teacher_forced(model, PROMPTS[0], output.token_ids)) < 1e-4  # fp32; six tokens


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (
            {**RELOAD[0], "json": {"method": "reload_weights", "kwargs": {"weights_path": "/gone"}}},
            r"POST \S+/collective_rpc: HTTP 500: .*Repo id must be in the form .*/gone",
        ),
        ({"path": "/gone", "method": "PUT"}, r"PUT \S+/gone: HTTP 501"),
        (
            {"path": "/update_weights_from_disk", "json": {"model_path": "{path}"}},
            r"HTTP 400: .*sees no safetensors files in /policy",
        ),
        ({"url": "http://127.0.0.1:9/x"}, r"POST http://127\.0\.0\.1:9/x: ConnectError"),
        ({"command": ["/no/such/program"]}, r"No such file"),
        (
            {"command": [sys.executable, "-c", "import sys; sys.exit('it broke: ' + sys.argv[1])", "{path}"]},
            r"exit status 1: it broke: /policy",
        ),
        ({"command": ["sleep", "9"]}, r"not done within rollout\.remote\.timeout_seconds=1"),
    ],
)
def test_a_reload_that_fails_is_named(directory, step, match):
    with CompletionServer(directory) as server:
        remote = sampler(server, timeout_seconds=1.0, reload=[RELOAD[1], step], directory="/policy")
        started = time.monotonic()
        with pytest.raises(
            ValueError, match=rf"(?s)rollout\.remote: {server.url}: rollout\.remote\.reload\[1\]: .*{match}"
        ):
            remote.refresh(reload=True)
        assert time.monotonic() - started < 5.0


def test_refresh_waits_for_a_server_that_restarts(directory):
    with CompletionServer(directory) as server:
        server.http.shutdown()  # connections are accepted, but not answered
        threading.Timer(0.7, lambda: server.http.serve_forever(poll_interval=0.02)).start()
        started = time.monotonic()
        sampler(server, request_timeout_seconds=0.2).refresh(reload=False)
        assert time.monotonic() - started > 0.6


def test_the_key_is_not_told_to_another_host(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    with CompletionServer(directory, key="s3cret-key") as server, CompletionServer(directory, key="other") as foreign:
        foreign_step = {"url": f"{foreign.url}/reset_prefix_cache"}
        remote = sampler(server, api_key_env="MY_KEY", reload=[RELOAD[1], foreign_step], directory="/policy")
        with pytest.raises(ValueError, match=r"reload\[1\].*HTTP 401: .*\"got\": null"):
            remote.refresh(reload=True)


LOAD = [
    {"path": "/collective_rpc", "json": {"method": "nemo_brain_load", "kwargs": {"path": "{path}"}}},
    {"path": "/reset_prefix_cache?reset_running_requests=true"},
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """Other weights than ``directory``'s."""
    return save_model(tmp_path_factory.mktemp("policy"), VOCAB, END, seed=1)


@pytest.fixture
def short_watch(monkeypatch):
    monkeypatch.setattr(pool_module, "_WATCH_SECONDS", 0.05)


def are_of(groups: list[SampledGroup], directory: Path) -> bool:
    """Whether the outputs' log-probs are this model's. fp32, six tokens; other weights are whole nats away."""
    return max(errors(groups, directory)) < 1e-4


def errors(groups: list[SampledGroup], directory: Path) -> list[float]:
    """Of the outputs' log-probs, against this model's, in nats."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    return [
        abs(logprob - teacher_forced(model, group.prompt, output.token_ids))
        for group in groups
        for output, logprob in zip(group.outputs, group.proposal_logprobs, strict=True)
    ]


def test_what_a_server_serves_is_looked_at_before_it_is_changed(directory, policy):
    with CompletionServer(directory) as server:
        wrong = sampler(server, reload=LOAD, directory=policy, version="1")
        wrong.config.model = "other"
        with pytest.raises(ValueError, match=r"rollout\.remote\.model=other is not served; served: policy"):
            wrong.refresh(reload=True)
        server.context = 99
        long = RemoteSampler(wrong.config, OPTIONS, TOKENIZER, VOCAB, 100, ServedWeights(policy, "1"))
        long.config.model = "policy"
        with pytest.raises(ValueError, match=r"the context of policy there is 99 tokens.* are 100: .*--max-model-len"):
            long.refresh(reload=True)
        gone = sampler(server, reload=LOAD, directory=Path("/gone"), version="1")
        with pytest.raises(ValueError, match=r"reload\[0\].*this server sees no safetensors files in /gone"):
            gone.refresh(reload=True)
        assert not server.loads and server.version == "default"
        assert are_of(sampled(sampler(server)), directory)


def test_weights_are_loaded_again_only_where_the_server_has_others(directory, policy):
    with CompletionServer(directory) as server:
        ours = sampler(server, reload=LOAD, directory=policy, version="1")
        ours.refresh(reload=True)
        ours.refresh(reload=False)
        assert len(server.loads) == 1 and server.version.startswith("1:")
        server.kill()
        server.restart()
        assert server.version == "default"
        ours.refresh(reload=False)
        assert len(server.loads) == 2 and are_of(sampled(ours), policy)


@pytest.mark.parametrize(
    ("kind", "versions"),
    [("vllm", True), ("vllm", False), ("sglang", True)],
    ids=["it says which weights it has", "it does not", "SGLang"],
)
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_server_that_is_started_again_meanwhile_gets_the_weights_first(
    directory, policy, short_watch, end, kind, versions
):
    """Requests that hang are given up when /health fails; the same outputs come as without it."""
    with CompletionServer(directory, kind) as server:
        server.versions = versions
        load = LOAD if kind == "vllm" else [{"path": "/update_weights_from_disk", "json": {"model_path": "{path}"}}]
        keys = {"server": kind, "reload": load, "request_timeout_seconds": 300.0}
        ours = sampler(server, directory=policy, version="1", **keys)
        ours.refresh(reload=True)
        expected = sampled(ours)
        assert are_of(expected, policy)
        begun = threading.Event()

        def before(body) -> None:
            if not begun.is_set() and server.answered > 20:
                begun.set()
                getattr(server, end)()
                threading.Timer(0.5, server.restart).start()

        server.before = before
        started = time.monotonic()
        assert sampled(ours) == expected
        assert begun.is_set() and len(server.loads) == 2 and time.monotonic() - started < 20


def test_no_output_counts_of_a_server_that_was_started_again_unnoticed(directory, policy):
    """What it draws until it is looked at again is of its start weights' law, in part by chance close to ours."""
    with CompletionServer(directory) as server:
        ours = sampler(server, concurrency=2, reload=LOAD, directory=policy, version="1")
        ours.refresh(reload=True)
        expected = sampled(ours)
        starts = [18, 25]  # outputs before it: of the first, and of those that are asked for again

        def before(body) -> None:
            if starts and server.answered >= starts[0]:
                starts.pop(0)
                server.replace()

        server.before = before
        assert sampled(ours) == expected
        assert not starts and len(server.loads) >= 2 and are_of(expected, policy)


@pytest.mark.parametrize("noticed", [False, True], ids=["unnoticed", "noticed"])
def test_a_server_that_names_its_weights_no_longer_gets_them_again(directory, policy, short_watch, noticed):
    """Started again without what makes it name them, it is taken as one that never has."""
    with CompletionServer(directory) as server:
        ours = sampler(server, reload=LOAD, directory=policy, version="1")
        ours.refresh(reload=True)
        expected = sampled(ours)
        begun = threading.Event()

        def before(body) -> None:
            if server.answered > 20 and not begun.is_set():
                begun.set()
                server.versions = False
                if noticed:
                    server.kill()
                    threading.Timer(0.3, server.restart).start()
                else:
                    server.replace()

        server.before = before
        assert sampled(ours) == expected
        assert begun.is_set() and len(server.loads) == 2


def test_a_server_that_gives_no_answer_about_its_weights_is_given_up(directory, policy, short_watch):
    with CompletionServer(directory) as server:
        ours = sampler(server, reload=LOAD, directory=policy, version="1", timeout_seconds=1.0)
        ours.refresh(reload=True)
        server.before = lambda body: setattr(server, "silent", True)
        started = time.monotonic()
        with pytest.raises(
            ValueError, match=r"timeout_seconds=1: .*(does not say which weights|version of its weights)"
        ):
            sampled(ours)
        assert time.monotonic() - started < 15


def test_a_server_that_has_always_just_been_started_again_is_given_up(directory, policy, short_watch, monkeypatch):
    monkeypatch.setattr(pool_module, "_ATTEMPTS", 3)
    with CompletionServer(directory) as server:
        ours = sampler(server, concurrency=1, reload=LOAD, directory=policy, version="1")
        ours.refresh(reload=True)
        server.before = lambda body: server.replace()
        with pytest.raises(
            ValueError, match=r"prompt 'p\d', output \d: 3 times its server was lost, or had other weights"
        ):
            sampled(ours)


def test_weights_that_a_server_changes_on_its_own_are_seen_by_their_version(directory, policy, short_watch):
    with CompletionServer(directory) as server:
        ours = sampler(server, concurrency=1, reload=LOAD, directory=policy, version="1")
        ours.refresh(reload=True)

        def other(body) -> None:
            if server.answered == 2 and len(server.loads) == 1:
                server.version = "another run's"
                time.sleep(0.5)

        server.before = other
        sampled(ours)
        assert len(server.loads) == 2 and server.version.startswith("1:")

        def always(body) -> None:
            server.version = "another run's"
            time.sleep(0.5)

        server.before = always
        with pytest.raises(ValueError, match=r"timeout_seconds=1\.5: .*its weights are \"another run's\", not '1'"):
            sampled(sampler(server, reload=LOAD, directory=policy, version="1", timeout_seconds=1.5))


def test_several_servers_share_the_work_and_a_lost_one_is_taken_back(directory, policy, short_watch):
    with CompletionServer(directory) as first, CompletionServer(directory) as second:
        ours = sampler([first.url, second.url], concurrency=2, reload=LOAD, directory=policy, version="1")
        assert ours.refresh(reload=True) == [first.url, second.url]
        expected = sampled(ours)
        assert are_of(expected, policy) and min(len(first.bodies), len(second.bodies)) > 2
        assert {body["seed"] for body in first.bodies}.isdisjoint(body["seed"] for body in second.bodies)

        many = [Prompt(f"m{i}", "a", [97]) for i in range(12)]
        lost = threading.Event()

        def lose(body) -> None:
            if not lost.is_set():
                lost.set()
                second.kill()
                threading.Timer(0.3, second.restart).start()

        second.before = lose
        first.before = lambda body: time.sleep(0.05)
        groups = sampled(ours, many)
        assert len(groups) == 12 and are_of(groups, policy)
        assert len(second.loads) == 2 and second.version.startswith("1:"), "taken back, with the weights"

        second.kill()
        with pytest.warns(UserWarning, match=rf"{second.url} is left out: ConnectError"):
            assert ours.refresh(reload=True) == [first.url]
        first.kill()
        with pytest.raises(ValueError, match=rf"none of the servers answers: {first.url}: Connect.*; {second.url}: "):
            ours.refresh(reload=True)


def test_a_server_whose_model_a_reload_has_destroyed_is_not_waited_for_forever(directory, short_watch):
    """vLLM's own reload of a directory that it does not see: /health says nothing, the next request ends it."""
    with CompletionServer(directory) as server:
        gone = sampler(server, reload=RELOAD, directory=Path("/gone"), version="1", timeout_seconds=1.5)
        with pytest.raises(ValueError, match=r"reload\[0\].*Repo id must be in the form"):
            gone.refresh(reload=True)
        with pytest.raises(ValueError, match=r"within rollout\.remote\.timeout"):
            sampled(gone)
