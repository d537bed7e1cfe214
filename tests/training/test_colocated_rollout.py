"""Runs that sample with an engine in their own processes. Its part is done here by tests/completion_server.py's model:
vLLM's own engine is run by tests/engines."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from completion_server import END, draw
from layouts import PP2, TP2
from ranks import run_ranks
from remote_runs import RUN
from toy_runs import recorded_run, toy_config
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_brain.config.brain import check
from nemo_brain.training.brain import run
from nemo_brain.training.brain.colocated_rollout import ColocatedRollout, vllm_engine

COLOCATED = (*RUN, "rollout.engine=colocated")
CALLS: list[tuple] = []


class Engine:
    """Has the interface of ``InProcessEngine``; every rank has a model of its own, and draws the same."""

    stale = False  # what a reload would leave in a tied output layer

    def __init__(self, directory, *, dtype, ranks, context, rows, memory, options):
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype).eval()
        self.awake = False
        CALLS.append(("made", ranks, context, memory))

    @torch.no_grad()
    def load(self, tensors) -> None:
        parameters = dict(self.model.named_parameters())
        seen = {name: parameters[name].copy_(tensor) for name, tensor in tensors}
        assert seen.keys() == parameters.keys()
        if self.stale:
            self.model.lm_head.weight = torch.nn.Parameter(1.3 * self.model.lm_head.weight)
        self.awake = True
        CALLS.append(("load",))

    @torch.no_grad()
    def generate(self, requests, parameters, stop=lambda: False):
        assert self.awake and not stop()
        for index, (prompt, seed) in reversed(list(enumerate(requests))):
            asked = {"prompt": prompt, **parameters}
            ids, logprobs, reason = draw(self._logits, asked, seed, END, processed=True)
            yield index, {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}

    def _logits(self, tokens: tuple) -> torch.Tensor:
        return self.model(torch.tensor([tokens])).logits[0, -1]

    def sleep(self) -> None:
        self.awake = False
        CALLS.append(("sleep",))


def with_engine(*overrides: str) -> dict:
    run.ColocatedRollout = functools.partial(ColocatedRollout, make_engine=Engine)
    result = recorded_run(*COLOCATED, *overrides)
    calls: list = [None] * dist.get_world_size()
    dist.all_gather_object(calls, CALLS)
    return {**result, "calls": calls}


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(1, ["rollout.temperature=0.8"]), (2, [PP2]), (4, [TP2, "model.peft={dim: 8}", "optim.lr=0.1"])],
    ids=["one process, another temperature", "PP2", "TP2 x DP2, adapters"],
)
def test_an_engine_of_the_replicas_ranks_samples_from_each_policy(ranks, overrides):
    result, *_ = run_ranks(with_engine, ranks, *overrides)
    for calls in result["calls"]:
        assert calls[0] == ("made", min(ranks, 2), calls[0][2], 0.4)
        # Two iterations and two validations; between them the memory is the training's.
        assert calls[1:] == [("load",), ("sleep",)] * 4
    iterations = [record for record in result["metrics"] if record["kind"] == "iteration"]
    assert len(iterations) == 2
    for record in iterations:
        assert record["proposal_gap"] < 1e-4  # sums of 8 log-probs in fp32, computed twice
        assert record["refresh_bytes"] > 0 and record["refresh_bytes_per_second"] > 0
        assert (record["kl_to_prior"] == pytest.approx(0, abs=1e-4)) == (record["iteration"] == 0)


def stale(*overrides: str) -> None:
    Engine.stale = True
    with_engine(*overrides)


def test_an_engine_that_samples_from_another_law_ends_the_run():
    match = r"rollout\.engine=colocated: replica 0: its log-probs of 4 outputs .* away from those of the policy"
    with pytest.raises(AssertionError, match=match):
        run_ranks(stale, 1, "data.holdout=0")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["rollout.engine=server"], r"rollout\.engine=server needs rollout\.remote"),
        (["rollout.engine=own", "rollout.remote={url:'http://a:1',model:m}"], r"set rollout\.remote=null, or leave"),
        (["rollout.engine=colocated", "rollout.remote={url:'http://a:1',model:m}"], r"rollout\.engine is colocated"),
        (["rollout.engine=colocated", "rollout.refresh=never"], r"rollout\.refresh=never needs rollout\.engine=own"),
        (["rollout.engine=vllm"], r"rollout\.engine must be one of null, own, server, colocated"),
        (["rollout.colocated_memory=1"], r"rollout\.colocated_memory must be above 0 and below 1"),
    ],
)
def test_engines_that_cannot_be_are_refused(overrides, match):
    with pytest.raises(ValueError, match=match):
        check(toy_config(*overrides))


def test_layouts_that_vllm_does_not_have_are_refused():
    with pytest.raises(AssertionError, match=r"consecutive ranks.*pipeline_model_parallel_size=2 and 2 replicas: use "):
        run_ranks(with_engine, 4, PP2)


def test_vllm_in_the_process_has_to_be_installed(tmp_path):
    with pytest.raises(ValueError, match=r"vLLM is not installed in the training's environment"):
        vllm_engine(tmp_path)
