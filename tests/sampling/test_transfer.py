"""Weights for servers over process groups, and what happens when one of them does not do its part.

The server is tests/completion_server.py, its worker's extension the one that vLLM is given; the groups are gloo's.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import httpx
import pytest
import torch
from completion_server import END, TOKENIZER, VOCAB, CompletionServer, save_model
from transformers import AutoModelForCausalLM

from nemo_brain.config.remote import RemoteConfig
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.data.stop import Stop
from nemo_brain.sampling import transfer as transfer_module
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.transfer import Transfer

PROMPTS = [Prompt("p", "a", [97]), Prompt("q", "xy", [120, 121])]


@pytest.fixture(autouse=True)
def short_looks(short_pauses, monkeypatch):
    monkeypatch.setattr(transfer_module, "_LOOK_SECONDS", 0.05)


@pytest.fixture(scope="module", params=[False, True], ids=["own output layer", "tied"])
def start(request, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), VOCAB, END, tied=request.param)


@pytest.fixture
def policy(start):
    """Other weights for the model that a server has started with."""
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def sampler(*servers: CompletionServer, version: str | None = "run-1", **keys) -> RemoteSampler:
    options = SamplingOptions(outputs=3, max_new_tokens=6, stop=Stop((END,)))
    limits = {"timeout_seconds": 20.0, "request_timeout_seconds": 10.0, "concurrency": 4}
    url = [server.url for server in servers]
    config = RemoteConfig(url=url, model="policy", transfer="process_group", **{**limits, **keys})
    return RemoteSampler(config, options, TOKENIZER, VOCAB, weights=ServedWeights(version=version))


def give(sampler: RemoteSampler, model, version: str = "run-1", names=lambda name: True) -> list[str]:
    sampler.refresh(reload=True)
    transfer = Transfer(sampler.waiting, version)
    for name, parameter in model.named_parameters():
        if names(name):
            transfer.add(name, parameter.detach())
    return transfer.finish()


def are_of(sampler: RemoteSampler, model) -> bool:
    """Whether the log-probs of sampled outputs are this model's. fp32, six tokens; other weights are nats away."""
    groups: list[SampledGroup] = [answer[1] for answer in sampler.sample(PROMPTS, 1, 2) if answer is not None]
    gaps = []
    for group in groups:
        for output, logprob in zip(group.outputs, group.proposal_logprobs, strict=True):
            prompt, tokens = group.prompt.token_ids, output.token_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            ours = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()
            gaps.append(abs(ours - logprob))
    return max(gaps) < 1e-4


@pytest.mark.parametrize("bucket", [1, 4000, 2**30], ids=["tensor by tensor", "some at a time", "all at once"])
def test_every_server_has_the_weights_as_they_were_sent(start, policy, monkeypatch, bucket):
    """Nothing is left of the old ones: not in a tied output layer, nor in what was computed of a prefix."""
    monkeypatch.setattr(transfer_module, "BUCKET_BYTES", bucket)
    with CompletionServer(start) as first, CompletionServer(start) as second:
        ours = sampler(first, second)
        assert not are_of(sampler(first, second, version=None), policy)
        assert give(ours, policy) == [first.url, second.url]
        for server in first, second:
            assert server.version.startswith("run-1:") and list(server.received[0]) == [
                n for n, _ in policy.named_parameters()
            ]
            assert are_of(sampler(server), policy)
        assert not ours.waiting


def test_bytes_and_dtypes_arrive_as_they_are(start, policy):
    found = {}
    with CompletionServer(start) as server:
        ours = sampler(server)
        ours.refresh(reload=True)
        transfer = Transfer(ours.waiting, "run-1")
        for name, parameter in policy.named_parameters():
            transfer.add(name, parameter.detach().mT.bfloat16().mT if parameter.dim() > 1 else parameter.detach())
        transfer.finish()
        (found,) = server.received
    expected = {name: p.numel() * (2 if p.dim() > 1 else 4) for name, p in policy.named_parameters()}
    assert found == expected and transfer.bytes == sum(expected.values()) and transfer.seconds > 0


def test_a_server_says_by_its_version_whether_it_needs_all_of_the_weights(start, policy):
    def waits(version: str, reload: bool = False) -> list:
        ours = sampler(server, version=version)
        ours.refresh(reload)
        return [waiting.waiting for waiting in ours.waiting]

    with CompletionServer(start) as server:
        assert waits("run-1") == ["all"]
        give(sampler(server), policy)
        assert waits("run-1") == []
        assert waits("run-2") == waits("run-2", reload=True) == ["changed"]
        assert waits("run-1", reload=True) == ["all"], "it has them by its own account, and yet is in doubt"
        assert waits("other-1") == ["all"]
        server.kill()
        server.restart()
        assert waits("run-2") == ["all"]


def test_a_lost_server_takes_no_other_along(start, policy):
    with CompletionServer(start) as first, CompletionServer(start) as second:

        def lose(name: str) -> None:
            if len(second.received[0]) == 3:
                second.kill()
                raise RuntimeError("gone")

        second.during = lose
        ours = sampler(first, second)
        with pytest.warns(UserWarning, match=rf"{second.url} was lost when it was given weights: ConnectError"):
            assert give(ours, policy) == [first.url]
        assert are_of(sampler(first), policy) and not ours.waiting
        second.during = lambda name: None
        second.restart()
        assert ours.refresh(reload=False) == [first.url, second.url]
        assert [server.url for server in ours.waiting] == [second.url]


def test_a_worker_that_does_not_join_is_not_waited_for_forever(start, policy, monkeypatch):
    monkeypatch.setattr(transfer_module, "_JOIN_SECONDS", 1.0)
    with CompletionServer(start) as server:
        call = server.call
        server.call = lambda method, arguments: time.sleep(4 if "receive" in method else 0) or call(method, arguments)
        started = time.monotonic()
        match = (
            rf"{server.url}: its weights: not all of its 1 workers have joined the process group: .* have to reach "
            r"127\.0\.0\.1, port \d+ and others, .* or set rollout\.remote\.transfer=directory"
        )
        with pytest.raises(ValueError, match=match):
            give(sampler(server), policy)
        assert time.monotonic() - started < 4
        assert are_of(sampler(server, version=None), AutoModelForCausalLM.from_pretrained(start))


def test_a_worker_that_fails_in_the_middle_ends_the_transfer_with_its_error(start, policy):
    with CompletionServer(start) as server:

        def fail(name: str) -> None:
            raise RuntimeError(f"no place for {name}")

        server.during = fail
        with pytest.raises(ValueError, match=r"its weights \(nemo_brain_receive\).*HTTP 500.*no place for model\."):
            give(sampler(server), policy)
        assert server.version.startswith("incomplete:"), "it is not taken for one that has the weights"


def test_a_transfer_that_is_cut_short_leaves_a_server_that_can_be_given_them_again(start, policy, monkeypatch):
    monkeypatch.setattr(transfer_module, "BUCKET_BYTES", 1)
    with CompletionServer(start) as server:
        ours = sampler(server)
        ours.refresh(reload=True)
        transfer = Transfer(ours.waiting, "run-1")
        transfer.add("model.norm.weight", policy.model.norm.weight.detach())
        answer = transfer._receivers[0]._answer
        del transfer  # as when its process ends
        with pytest.raises(ValueError, match="the weights did not arrive in full"):
            answer.result(20)
        assert server.version.startswith("incomplete:")
        with contextlib.suppress(ValueError):
            assert not are_of(sampler(server, version=None), policy)
        assert give(sampler(server), policy) == [server.url] and are_of(sampler(server), policy)


def test_a_server_that_cannot_take_them_is_refused_before_anything_is_changed(start, policy, monkeypatch):
    with CompletionServer(start) as server:
        server.engines = 2
        with pytest.raises(ValueError, match=r"2 data-parallel engines behind one address .*rollout\.remote\.url"):
            give(sampler(server), policy)
        server.call = lambda method, arguments: (500, {"error": f"no method {method}"})
        with pytest.raises(ValueError, match=r"no method nemo_brain_worker.*--worker-extension-cls nemo_brain_vllm"):
            give(sampler(server), policy)
        server.versions = False
        with pytest.raises(ValueError, match=r"it keeps none .*VLLM_SERVER_DEV_MODE=1.*transfer=directory"):
            give(sampler(server), policy)
        assert not server.received
        assert httpx.get(server.url + "/health").is_success
