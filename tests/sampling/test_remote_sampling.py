"""Outputs of an inference server: their law, their log-probs, and what happens when the server misbehaves.

The server is tests/completion_server.py: a real HTTP server on this machine with a real model.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from completion_server import END, TINY, TOKENIZER, VOCAB, CompletionServer, save_model
from laws import SIGNIFICANT, chi_square
from omegaconf import OmegaConf
from ranks import free_port
from remote_samplers import PROMPTS, RELOAD, STOP, finished, sampled, sampler, teacher_forced, tokens_of
from toy_runs import toy_config
from transformers import AutoModelForCausalLM

from nemo_brain.config.brain import check
from nemo_brain.config.remote import RemoteConfig
from nemo_brain.core.groups import Prompt
from nemo_brain.data.stop import Stop
from nemo_brain.data.tokenizers import decode
from nemo_brain.sampling import remote as remote_module
from nemo_brain.sampling.remote import RemoteSampler, request_seed
from nemo_brain.sampling.sampler import SamplingOptions

LENGTH, ROWS = 3, 3_000  # of the test of the law: tokens of an output, outputs


pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.mark.parametrize(
    ("kind", "dialect"), [("vllm", "vllm"), ("old vllm", "vllm"), ("sglang", "sglang"), ("trtllm", "trtllm")]
)
def test_outputs_are_as_the_local_sampler_gives_them(directory, kind, dialect):
    reports = []
    options = SamplingOptions(outputs=6, max_new_tokens=12, stop=STOP)
    with CompletionServer(directory, kind) as server:
        remote = sampler(server, options, server=dialect)
        pairs = list(finished(remote, on_outputs=reports.append))
        assert len(server.bodies) == 24
    assert sum(reports) == 24
    model = AutoModelForCausalLM.from_pretrained(directory)
    lengths = []
    for index, group in pairs:
        assert group.prompt is PROMPTS[index] and len(group.outputs) == 6
        assert len({tuple(output.token_ids) for output in group.outputs}) > 1, "outputs have draws of their own"
        assert group.policy_logprobs is None and group.prior_logprobs is None
        for output, logprob in zip(group.outputs, group.proposal_logprobs, strict=True):
            assert output.ended == (END in output.token_ids)
            assert output.token_ids.count(END) == output.ended and (not output.ended or output.token_ids[-1] == END)
            assert output.ended or len(output.token_ids) == 12
            assert output.text == decode(TOKENIZER, output.token_ids[: -1 if output.ended else None])
            # fp32; twelve tokens.
            assert abs(logprob - teacher_forced(model, group.prompt, output.token_ids)) < 1e-4
            lengths.append(len(output.token_ids))
    assert min(lengths) < 12 == max(lengths), "some outputs end, some are cut off"


def test_draws_are_keyed_by_seed_iteration_prompt_and_output(directory):
    with CompletionServer(directory) as server:
        everything = tokens_of(sampled(sampler(server)))
        assert tokens_of(sampled(sampler(server, concurrency=1))) == everything
        for index, prompt in enumerate(PROMPTS):
            assert tokens_of(sampled(sampler(server), [prompt])) == everything[index : index + 1]
        fewer = sampler(server, SamplingOptions(outputs=2, max_new_tokens=6, stop=STOP))
        assert tokens_of(sampled(fewer)) == [outputs[:2] for outputs in everything]
        assert tokens_of(sampled(sampler(server), seed=2)) != everything
        assert tokens_of(sampled(sampler(server), iteration=3)) != everything
    seeds = {request_seed(s, i, p, o) for s in (1, 2) for i in (0, 1, 11) for p in ("1", "11") for o in (0, 1, 11)}
    assert len(seeds) == 36 and max(seeds) < 2**53


def test_outputs_do_not_depend_on_how_many_are_asked_for_together(directory):
    """Those of a request come in any order, and have seeds of their own, which no other output of the prompt has."""
    shuffle = lambda answer: answer["choices"].reverse()  # noqa: E731
    with CompletionServer(directory) as server:
        everything = tokens_of(sampled(sampler(server)))
        assert all(len({tuple(output) for output in outputs}) > 1 for outputs in everything)
        server.bodies.clear()
        server.fault = lambda attempt, body: shuffle
        assert tokens_of(sampled(sampler(server, outputs_per_request=3))) == everything
        assert sorted(body["n"] for body in server.bodies) == [1] * 4 + [3] * 4
        taken = [set(range(body["seed"], body["seed"] + body["n"])) for body in server.bodies]
        assert len(set().union(*taken)) == 16
        # Those that are drawn again need not follow one another.
        server.bodies.clear()
        some = list(finished(sampler(server, outputs_per_request=3), PROMPTS[:1], numbers=[[0, 2, 3]]))
        assert tokens_of([some[0][1]]) == [[everything[0][i] for i in (0, 2, 3)]]
        assert sorted(body["n"] for body in server.bodies) == [1, 2]


def test_a_request_for_several_outputs_is_repeated_as_a_whole(directory):
    def lose_one(answer):
        answer["choices"].pop()

    def twice(answer):
        answer["choices"][0]["index"] = 1

    faults = ["drop", lose_one, twice, set_logprob(math.nan)]
    with CompletionServer(directory) as server:
        expected = sampled(sampler(server))
        server.fault = lambda attempt, body: faults[attempt - 1] if attempt <= len(faults) else None
        server._attempts.clear()
        assert sampled(sampler(server, outputs_per_request=4)) == expected
        for fault, match in {lose_one: "3 choices, 4 were asked for", twice: r"numbered \[1, 1, 2, 3\], not 0"}.items():
            server.fault = lambda attempt, body, fault=fault: fault
            with pytest.raises(ValueError, match=rf"prompt 'p0', output 0 to 3: 4 wrong answers in a row.*{match}"):
                sampled(sampler(server, outputs_per_request=4), PROMPTS[:1])


def test_any_end_token_and_string_ends_an_output(directory):
    """Draws do not depend on what ends an output, so each is the beginning of the longer one."""
    longer = SamplingOptions(outputs=8, max_new_tokens=12, stop=STOP)
    with CompletionServer(directory) as server:
        whole = sampled(sampler(server, longer), PROMPTS, 1, 2)
        outputs = [output for group in whole for output in group.outputs]
        other, string = outputs[0].token_ids[1], TOKENIZER.decode(outputs[1].token_ids[1:3])
        stop = Stop((END, other), (string,))
        cut = sampled(sampler(server, replace(longer, stop=stop)), PROMPTS, 1, 2)
    ended = 0
    for before, after in zip(outputs, (output for group in cut for output in group.outputs), strict=True):
        ids = next(
            (before.token_ids[:n] for n in range(1, 13) if stop.ended(TOKENIZER, before.token_ids[:n])),
            before.token_ids,
        )
        assert after == stop.output(TOKENIZER, ids)
        assert other not in after.token_ids[:-1] and string not in after.text
        ended += len(ids) < len(before.token_ids)
    assert ended >= 2


def test_an_output_that_goes_on_behind_its_end_is_refused(directory):
    stop = Stop((END,), ("�",))  # some of the random bytes are no character

    def ignore(attempt, body):
        body["stop"] = []

    with (
        CompletionServer(directory, fault=ignore) as server,
        pytest.raises(ValueError, match=r"goes on behind one of rollout\.stop_strings"),
    ):
        sampled(
            sampler(server, SamplingOptions(outputs=8, max_new_tokens=12, stop=stop), timeout_seconds=1), PROMPTS, 1, 2
        )


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_outputs_follow_the_models_law(tmp_path, temperature):
    """Sequences against the exact law of all 85 outputs of one prompt."""
    save_model(tmp_path, TINY, end=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = Prompt("p", "", [1, 4, 2])
    options = SamplingOptions(outputs=ROWS, max_new_tokens=LENGTH, stop=Stop((0,)), temperature=temperature)
    config = RemoteConfig(model="policy", url="", concurrency=8, logprobs="model" if temperature == 1 else "sampled")
    with CompletionServer(tmp_path, processed=temperature != 1) as server:
        config.url = server.url + "/v1/"
        (group,) = sampled(RemoteSampler(config, options, TOKENIZER, TINY), [prompt], 7, 0)
    law = {}
    for length in range(1, LENGTH + 1):
        for output in itertools.product(range(TINY), repeat=length):
            if 0 not in output[:-1] and (output[-1] == 0 or length == LENGTH):
                law[output] = math.exp(teacher_forced(model, prompt, list(output), temperature))
    assert len(law) == 85 and sum(law.values()) == pytest.approx(1, abs=1e-5)  # fp32
    index = {output: i for i, output in enumerate(law)}
    counts = np.array([index[tuple(output.token_ids)] for output in group.outputs])
    probs = np.array(list(law.values()))
    assert chi_square(counts, probs) > SIGNIFICANT
    for output, logprob in zip(group.outputs, group.proposal_logprobs, strict=True):
        assert abs(logprob - math.log(law[tuple(output.token_ids)])) < 1e-4
    # The test can fail: a law at another temperature is recognised as another one.
    other = np.array([math.exp(teacher_forced(model, prompt, list(output), 1.2 * temperature)) for output in law])
    assert chi_square(counts, other) < SIGNIFICANT


def until(condition) -> bool:
    """Whether the condition comes true within some seconds."""
    ended = time.monotonic() + 20
    while not condition() and time.monotonic() < ended:
        time.sleep(0.01)
    return condition()


def test_groups_come_as_they_are_finished_and_closing_ends_the_requests(directory):
    others = threading.Event()
    with CompletionServer(directory) as server:
        server.before = lambda body: body["prompt"] == PROMPTS[0].token_ids and others.wait(9)
        order = []
        for index, _ in finished(sampler(server, concurrency=16)):
            order.append(index)
            if sorted(order) == [1, 2, 3]:
                others.set()
        assert order[-1] == 0 and others.is_set()

        # Requests go on while the caller works on a group.
        server.bodies.clear()
        server.before = lambda body: time.sleep(0.01)
        groups = finished(sampler(server, concurrency=2))
        next(groups)
        assert until(lambda: len(server.bodies) == 16)
        groups.close()

        server.bodies.clear()
        closed = threading.Event()
        server.before = lambda body: body["prompt"] == PROMPTS[0].token_ids or closed.wait(9)
        groups = finished(sampler(server, concurrency=4))
        next(groups)
        started = time.monotonic()
        groups.close()
        assert time.monotonic() - started < 4
        assert len(server.bodies) < 16
        closed.set()
    assert not any(thread.name == "rollout.remote" for thread in threading.enumerate())


def test_the_caller_is_not_kept_waiting_for_a_slow_server(directory, monkeypatch):
    """It hears that nothing has come yet, and can close meanwhile."""
    monkeypatch.setattr(remote_module, "_POLL_SECONDS", 0.05)
    go = threading.Event()
    with CompletionServer(directory) as server:
        server.before = lambda body: go.wait(20)
        answers = sampler(server).sample(PROMPTS[:1], 1, 2)
        assert [next(answers) for _ in range(3)] == [None] * 3
        go.set()
        (place, group), *rest = [answer for answer in answers if answer is not None]
        assert (place, len(group.outputs), rest) == (0, 4, [])

        go.clear()
        answers = sampler(server).sample(PROMPTS[:1], 1, 2)
        assert next(answers) is None
        started = time.monotonic()
        answers.close()
        assert time.monotonic() - started < 4
        go.set()
    assert not any(thread.name == "rollout.remote" for thread in threading.enumerate())


def edit(change):
    """A fault: ``change`` is made to the answer's only choice."""
    return lambda answer: change(answer["choices"][0])


def set_logprob(value):
    return edit(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, value))


def duplicate(answer):
    answer["choices"] *= 2


WRONG = {
    "two choices": (duplicate, "2 choices, 1 was asked for"),
    "no choices": (lambda answer: answer.pop("choices"), "no choices in"),
    "NaN": (set_logprob(math.nan), "nan is not the log-prob of a sampled token"),
    "above zero": (set_logprob(0.5), r"0\.5 is not the log-prob"),
    "minus infinity": (set_logprob(-9999.0), r"-9999\.0 is not the log-prob"),
    "null": (set_logprob(None), "None is not the log-prob"),
    "too few": (edit(lambda c: c["logprobs"]["token_logprobs"].pop()), r"\d token ids and \d log-probs"),
    "no tokens": (
        edit(lambda c: (c.update(token_ids=[]), c["logprobs"].update(token_logprobs=[]))),
        "0 token ids and 0 log-probs",
    ),
    "no ids": (edit(lambda c: (c.pop("token_ids"), c["logprobs"].update(tokens=["a"]))), "no token ids with log-probs"),
    "no log-probs": (edit(lambda c: c.update(logprobs=None)), "no token ids with log-probs"),
    "foreign id": (edit(lambda c: c["token_ids"].__setitem__(0, VOCAB)), f"token id {VOCAB} is not in the vocabulary"),
    "text for id": (edit(lambda c: c["token_ids"].__setitem__(0, "7")), "token id '7' is not in the vocabulary"),
    "early end": (
        edit(lambda c: (c["token_ids"].insert(0, END), c["logprobs"]["token_logprobs"].insert(0, -1.0))),
        f"the end token {END} stands before the end|log-probs; as many",
    ),
    "other prompt": (edit(lambda c: c["prompt_token_ids"].insert(0, 1)), "sampled from another prompt"),
    "aborted": (edit(lambda c: c.update(finish_reason="abort")), "finish_reason is 'abort'"),
    "other end": (
        edit(lambda c: c.update(token_ids=[65], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop")),
        f"stopped at token 65, which is none of the end tokens \\[{END}\\]",
    ),
    "short context": (
        edit(lambda c: c.update(token_ids=[65], logprobs={"token_logprobs": [-1.0]}, finish_reason="length")),
        r"cut after 1 of rollout\.max_new_tokens=6 tokens: the server's context is too short",
    ),
    "no JSON": ("no JSON", r'no JSON: \{"choices": \['),
}


@pytest.mark.parametrize(
    "faults", [["drop", 500, 503, 429, "no JSON"], ["hang"], [WRONG[n][0] for n in ("NaN", "two choices", "null")]]
)
def test_passing_failures_change_nothing(directory, faults):
    """Each request fails once or several times, then succeeds: the same outputs as without failures."""
    with CompletionServer(directory) as server:
        expected = sampled(sampler(server))
    fail = lambda attempt, body: faults[attempt - 1] if attempt <= len(faults) else None  # noqa: E731
    with CompletionServer(directory, fault=fail) as server:
        found = sampled(sampler(server, concurrency=16, request_timeout_seconds=4.0 if "hang" in faults else 10.0))
        assert len(server.bodies) == 16 * (len(faults) + 1)
    assert found == expected


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_stays_wrong_is_named(directory, name):
    fault, match = WRONG[name]
    with CompletionServer(directory, fault=lambda attempt, body: fault) as server:
        remote = sampler(server)
        with pytest.raises(
            ValueError, match=rf"(?s)rollout\.remote: {server.url}: prompt 'p1', output \d: 4 wrong .*({match})"
        ):
            list(remote.sample(PROMPTS[1:2], 1, 2))


def test_a_server_that_is_down_is_given_up_within_the_budget(directory):
    down = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    match = (
        rf"{down}: prompt 'p\d', output \d: no usable answer within rollout\.remote\.timeout_seconds=1 .*ConnectError"
    )
    with pytest.raises(ValueError, match=match):
        list(sampler(down, timeout_seconds=1.0).sample(PROMPTS, 1, 2))
    assert time.monotonic() - started < 4.0
    with CompletionServer(directory, fault=lambda attempt, body: "hang") as server:
        started = time.monotonic()
        with pytest.raises(
            ValueError, match=r"no usable answer within .*=1 \(\d attempts\), the last: no answer within"
        ):
            list(sampler(server, timeout_seconds=1.0, request_timeout_seconds=0.3).sample(PROMPTS, 1, 2))
        assert time.monotonic() - started < 4.0
        server.fault = lambda attempt, body: 503
        with pytest.raises(ValueError, match=r"the last: HTTP 503: .*fault with"):
            list(sampler(server, timeout_seconds=0.5).sample(PROMPTS, 1, 2))
    # What waiting cannot mend is not repeated.
    with CompletionServer(directory) as server:
        wrong = sampler(server)
        wrong.config.model = "other"
        with pytest.raises(ValueError, match=r"HTTP 400: .*no such model"):
            list(wrong.sample(PROMPTS[:1], 1, 2))
        assert len(server.bodies) <= 8, "one request per connection"
        with pytest.raises(ValueError, match=r"rollout\.remote\.model=other is not served; served: policy"):
            wrong.refresh(reload=False)


def test_the_api_key_is_sent_and_never_shown(directory, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    with CompletionServer(directory, key="s3cret-key") as server:
        assert len(sampled(sampler(server, api_key_env="MY_KEY"))) == 4
        with pytest.raises(ValueError, match=r"HTTP 401.*environment variable that rollout\.remote\.api_key_env names"):
            list(sampler(server).sample(PROMPTS, 1, 2))
        # The server repeats what it was sent, in both kinds of error.
        for status in (400, 500):
            server.fault = lambda attempt, body, status=status: status
            with pytest.raises(ValueError) as caught:
                list(sampler(server, api_key_env="MY_KEY", timeout_seconds=0.5).sample(PROMPTS, 1, 2))
            assert "fault with Bearer ***" in str(caught.value) and "s3cret" not in str(caught.value)
            assert caught.value.__cause__ is None
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match=r"rollout\.remote\.api_key_env: the environment variable MY_KEY is not set"):
        sampler("http://127.0.0.1:1", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "s3cret\nkey")
    with pytest.raises(ValueError, match="no key") as caught:
        sampler("http://127.0.0.1:1", api_key_env="MY_KEY")
    assert "s3cret" not in str(caught.value)


def test_a_slower_server_gets_less(directory):
    with CompletionServer(directory) as slow, CompletionServer(directory) as fast:
        slow.before = lambda body: time.sleep(0.3)
        sampled(sampler([slow.url, fast.url], concurrency=2), [Prompt(f"m{i}", "a", [97]) for i in range(8)])
        assert len(slow.bodies) < len(fast.bodies)


REMOTE = "rollout.remote={url:'http://127.0.0.1:8000',model:policy"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["rollout.remote={model:policy}"], r"rollout\.remote\.url has no value"),
        (["rollout.remote={url:localhost,model:m}"], r"rollout\.remote\.url must be an address like http"),
        ([REMOTE + ",server:tgi}"], r"rollout\.remote\.server must be one of vllm, sglang, trtllm, not 'tgi'"),
        (["rollout.remote={url:[],model:m}"], r"rollout\.remote\.url must be an address like http.*or a list of them"),
        (["rollout.remote={url:['http://a:1',b],model:m}"], r"rollout\.remote\.url must be an address like http"),
        ([REMOTE + ",on_mismatch:skip}"], r"rollout\.remote\.on_mismatch must be one of redraw, keep, not 'skip'"),
        (
            [REMOTE + ",outputs_per_request:2,server:sglang}"],
            r"outputs_per_request=2 needs rollout\.remote\.server=vllm",
        ),
        ([REMOTE + ",outputs_per_request:0}"], r"rollout\.remote\.outputs_per_request must be at least 1"),
        ([REMOTE + ",transfer:nccl}"], r"rollout\.remote\.transfer must be one of directory, process_group"),
        (
            [REMOTE + ",transfer:process_group,server:sglang}"],
            r"transfer=process_group needs .*server=vllm.*for sglang",
        ),
        (
            [REMOTE + ",transfer:process_group,export_to:/x,reload:[{path:/a}]}"],
            r"transfer=process_group needs neither rollout\.remote\.export_to nor rollout\.remote\.reload",
        ),
        (
            [REMOTE + ",transfer:process_group}", "rollout.refresh=never"],
            r"rollout\.refresh=never samples from the start model.*rollout\.remote\.transfer to directory",
        ),
        (["rollout.max_proposal_gap=0"], r"rollout\.max_proposal_gap must be above 0"),
        ([REMOTE + ",concurrency:0}"], r"rollout\.remote\.concurrency must be at least 1"),
        ([REMOTE + ",timeout_seconds:0}"], r"rollout\.remote\.timeout_seconds must be above 0"),
        ([REMOTE + ",timeout:3}"], r"unknown configuration key rollout\.remote\.timeout"),
        ([REMOTE + "}"], r"without rollout\.remote\.reload the server keeps its first weights"),
        ([REMOTE + ",export_to:/x}"], r"rollout\.remote\.export_to .* and rollout\.remote\.reload .* go together"),
        ([REMOTE + "}", "rollout.temperature=1.2"], r"rollout\.remote\.logprobs=model .* --logprobs-mode"),
        ([REMOTE + ",logprobs:sampled}", "rollout.top_p=0.9"], r"importance weights cannot correct"),
        (
            [
                REMOTE + ",logprobs:sampled,server:sglang}",
                "rollout.top_p=0.9",
                "rollout.truncated_sampling_ok=true",
                "rollout.rescore_proposal=false",
            ],
            r"rollout\.top_k and rollout\.top_p need rollout\.remote\.server=vllm",
        ),
        ([REMOTE + ",export_to:/x,reload:[{paths:/a}]}"], r"rollout\.remote\.reload\[0\] must be \{path or url"),
        (
            [REMOTE + ",export_to:/x,reload:[{path:/a},{command:ls}]}"],
            r"reload\[1\]\.command must be a list of strings",
        ),
        ([REMOTE + ",export_to:/x,reload:[{command:[ls],json:{}}]}"], r"reload\[0\] must be"),
    ],
)
def test_configurations_that_cannot_work_are_refused(overrides, match):
    with pytest.raises(ValueError, match=match):
        check(toy_config(*overrides))


def test_configurations_are_accepted():
    config = toy_config()
    OmegaConf.set_struct(config, False)
    where = {"url": "http://127.0.0.1:8000", "model": "policy"}
    config.rollout.remote = {**where, "export_to": "/x", "reload": RELOAD}
    remote = check(config).rollout.remote
    assert remote.reload == RELOAD and remote.concurrency == 64 and isinstance(remote, RemoteConfig)
    assert check(toy_config()).rollout.remote is None
    check(toy_config(REMOTE + "}", "rollout.rescore_proposal=false"))
    check(toy_config(REMOTE + "}", "trainer.max_iterations=1"))
    assert check(toy_config(REMOTE + ",transfer:process_group,outputs_per_request:4}")).rollout.remote.follows
    check(toy_config(REMOTE + ",logprobs:sampled}", "trainer.max_iterations=1", "rollout.temperature=1.2"))
