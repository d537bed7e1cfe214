"""Rewards from a server: requests, and what happens when the server misbehaves, alone and in a run.

The server is tests/reward_server.py; tests/test_serve_reward.py has the real one.
"""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import pytest
from ranks import free_port, run_ranks
from reward_server import RewardServer
from toy_runs import recorded_run, toy_config

from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.http import HTTPReward
from nemo_brain.rewards.protocol import compute_rewards
from nemo_brain.training.brain.run import run

OUTPUTS = ["a", "bb", "ccc", "dddd", "eeeee", "", "ggggggg"]
LENGTHS = [float(len(output)) for output in OUTPUTS]


pytestmark = pytest.mark.usefixtures("short_pauses")


def http_reward(where: RewardServer | str, **arguments) -> HTTPReward:
    limits = {"timeout_seconds": 20.0, "request_timeout_seconds": 10.0, "batch_size": 2}
    return HTTPReward(where if isinstance(where, str) else where.url, **{**limits, **arguments})


def score(reward, outputs=OUTPUTS) -> list[float]:
    prompts = [f"p{i}" for i in range(len(outputs))]
    references = [None if i % 2 else f"r{i}" for i in range(len(outputs))]
    return compute_rewards(
        reward, prompts, outputs, references=references, metadata=[{"n": i} for i in range(len(outputs))]
    )


def test_outputs_are_sent_in_batches_several_at_a_time():
    with RewardServer() as server:
        server.seconds = 0.1
        assert score(http_reward(server, concurrency=3)) == LENGTHS
        assert server.most == 3
        items = sorted((item for request in server.requests for item in request), key=lambda item: item["prompt"])
        expected = {"prompt": "p1", "output": "bb", "reference": None, "metadata": {"n": 1}}
        assert len(items) == 7 and items[1] == expected and items[0]["reference"] == "r0"
        assert sorted(map(len, server.requests)) == [1, 2, 2, 2]
        server.most = 0
        server.requests.clear()
        assert score(http_reward(server, concurrency=1, batch_size=3)) == LENGTHS
        assert server.most == 1 and sorted(map(len, server.requests)) == [1, 3, 3]


MALFORMED = b'{"rewards": [1.0'


@pytest.mark.parametrize(
    "faults",
    [
        ["drop", 500, 503, 429, 408],
        ["half", MALFORMED],
        ["hang"],
        [{"rewards": [1.0] * 3}, {"rewards": [math.nan] * 2}, {}],
    ],
    ids=["dropped connection and statuses", "cut off and malformed JSON", "slow", "wrong answers"],
)
def test_passing_failures_change_nothing(faults):
    """Each request fails once or several times, then succeeds."""
    fail = lambda attempt, items: faults[attempt - 1] if attempt <= len(faults) else None  # noqa: E731
    with RewardServer(fault=fail) as server:
        request_timeout = 0.5 if "hang" in faults else 10.0
        assert score(http_reward(server, request_timeout_seconds=request_timeout)) == LENGTHS
        assert len(server.requests) == 4 * (len(faults) + 1)


WRONG = {
    "malformed JSON": (
        MALFORMED,
        r'ConnectionError: .*4 wrong answers in a row, the last: no JSON: \{"rewards": \[1\.0',
    ),
    "not an object": ([1.0, 2.0], r"no \{\"rewards\": \[\.\.\.\]\} in \[1\.0, 2\.0\]"),
    "no list": ({"rewards": 1.0}, r"no \{\"rewards\""),
    "too few": ({"rewards": [1.0]}, r"1 rewards for 2 outputs; .*, on output 3: 'dddd' to the prompt 'p3'"),
    "too many": ({"rewards": [1.0] * 3}, r"3 rewards for 2 outputs; .*, on output 3: 'dddd' to the prompt 'p3'"),
    "NaN": ({"rewards": [1.0, math.nan]}, r"the reward nan \(a finite .*, on output 3: 'dddd' to the prompt 'p3'"),
    "infinity": (b'{"rewards": [-Infinity, 1]}', r"the reward -inf .*, on output 2: 'ccc' to the prompt 'p2'"),
    "no float": (b'{"rewards": [1, 1' + b"0" * 400 + b"]}", r"the reward 10000.*, on output 3"),
    "null": ({"rewards": [None, 1]}, r"the reward None .*, on output 2: 'ccc'"),
    "a string": ({"rewards": ["1", 1]}, r"the reward 1 \(a finite number is expected\), on output 2"),
    "a boolean": ({"rewards": [1, True]}, r"the reward True .*, on output 3"),
    "its reward fails": (
        (500, {"error": {"message": "division by zero", "item": 1}}),
        r"HTTP 500: division by zero, on output 3: 'dddd' to the prompt 'p3'",
    ),
    "it refuses an item": (
        (422, {"error": {"message": "items[0].metadata must be an object", "item": 0}}),
        r"HTTP 422: items\[0\]\.metadata must be an object, on output 2: 'ccc'",
    ),
    "an item that is none": (
        (500, {"error": {"message": "x", "item": 9}}),
        r"ConnectionError: .*HTTP 500: x, on a batch",
    ),
    "a status that stays": (404, r"ConnectionError: .*outputs 2 to 3: HTTP 404: .*fault with None.*, on a batch of 7"),
    "too large": (413, "HTTP 413"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_stays_wrong_is_named_with_address_prompt_and_output(name):
    fault, match = WRONG[name]
    with RewardServer(fault=lambda attempt, items: fault if items[0]["output"] == "ccc" else None) as server:
        started = time.monotonic()
        with pytest.raises(ValueError, match=rf"(?s)^the reward HTTPReward of {server.url} failed with .*{match}"):
            score(http_reward(server))
        assert time.monotonic() - started < 5
        assert sum(items[0]["output"] == "ccc" for items in server.requests) == (4 if not isinstance(fault, int) else 1)


def test_a_server_that_is_down_or_slow_is_given_up_within_the_budget():
    down = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    match = rf"{down}: POST /score, outputs \d to \d: no usable answer within reward\.timeout_seconds=1 .*ConnectError"
    with pytest.raises(ValueError, match=match + r".*, on a batch of 7 from output 0: 'a' to the prompt 'p0'"):
        score(http_reward(down, timeout_seconds=1.0))
    assert time.monotonic() - started < 2
    with RewardServer(fault=lambda attempt, items: "hang") as server:
        started = time.monotonic()
        with pytest.raises(
            ValueError, match=r"no usable answer within .*=1 \(\d attempts\), the last: no answer within"
        ):
            score(http_reward(server, timeout_seconds=1.0, request_timeout_seconds=0.3))
        assert time.monotonic() - started < 2


def test_the_api_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    with RewardServer(key="s3cret-key") as server:
        assert score(http_reward(server, api_key_env="MY_KEY")) == LENGTHS
        with pytest.raises(ValueError, match=r"HTTP 401.*environment variable that reward\.api_key_env names"):
            score(http_reward(server))
        for status in (400, 500):
            server.fault = lambda attempt, items, status=status: status
            with pytest.raises(ValueError) as caught:
                score(http_reward(server, api_key_env="MY_KEY", timeout_seconds=0.5))
            assert "fault with Bearer ***" in str(caught.value)
            error = caught.value
            while error is not None:
                assert "s3cret" not in repr(error)
                error = error.__cause__ or error.__context__
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match=r"reward\.api_key_env: the environment variable MY_KEY is not set"):
        http_reward("http://127.0.0.1:1", api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"url": "localhost:80"}, r"reward\.url must be an address like http"),
        ({"url": None}, r"reward\.url must be an address like http"),
        ({"url": "http://me:pw@host"}, r"reward\.url must be .* without user name"),
        ({"batch_size": 0}, r"reward\.batch_size must be an integer of at least 1, not 0"),
        ({"concurrency": 1.5}, r"reward\.concurrency must be an integer"),
        ({"timeout_seconds": 0}, r"reward\.timeout_seconds must be above 0, not 0"),
        ({"request_timeout_seconds": math.inf}, r"reward\.request_timeout_seconds must be above 0, not inf"),
        ({"timeout": 3}, "timeout"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, match):
    section = {"_target_": "nemo_brain.rewards.http.HTTPReward", "url": "http://127.0.0.1:1", **arguments}
    with pytest.raises(ValueError, match=match) as caught:
        make_reward(section)
    assert "pw" not in str(caught.value)


# In a run.

RUN = (
    "trainer.max_iterations=2",
    "rollout.prompts_per_iteration=16",
    "rollout.outputs_per_prompt=8",
    "data.holdout=0",
    "reward._target_=nemo_brain.rewards.http.HTTPReward",
    "reward.function=null",
)


def run_of(server: RewardServer) -> dict:
    server.http.socket.close()  # inherited: while it is open, the port stays taken
    return recorded_run(*RUN, f"+reward.url={server.url}", "+reward.timeout_seconds=30")


def test_a_server_that_is_restarted_changes_nothing_in_a_run():
    """It stops listening in the middle of the second iteration, drops what it has, and comes back on the same port."""

    def restart() -> None:
        server.http.shutdown()
        server.http.server_close()
        time.sleep(0.5)
        server.http = type(server.http)(server.http.server_address, server.http.RequestHandlerClass)
        threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    restarted: list[threading.Thread] = []
    lock = threading.Lock()

    def fault(attempt, items):
        with lock:
            if len(server.requests) >= 12 and not restarted:
                restarted.append(threading.Thread(target=restart))
                restarted[0].start()
        return "drop" if restarted and restarted[0].is_alive() else None

    with RewardServer() as server:
        expected, *_ = run_ranks(run_of, 1, server)
        assert len(server.requests) == 2 * 16 * 8 / 16
        server.requests.clear()
        server.fault = fault
        found, *_ = run_ranks(run_of, 1, server)
        assert restarted and len(server.requests) > 16
    assert found["samples"] == expected["samples"]
    assert [r["reward/mean"] for r in found["metrics"] if r["kind"] == "iteration"] == [
        r["reward/mean"] for r in expected["metrics"] if r["kind"] == "iteration"
    ]


def failed_run(run_dir: Path, *overrides: str) -> tuple[str, float]:
    """One rank's error, and the seconds since the reward server was last asked in vain for the first time."""
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        run(toy_config(f"run_dir={run_dir}", *RUN, *overrides))
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize("layout", [[], ["model.pipeline_model_parallel_size=2"]], ids=["DP2", "PP2"])
def test_a_server_that_stays_down_ends_every_rank_and_loses_no_group(tmp_path, layout):
    budget = 2
    down_since: list[float] = []
    refused: set[str] = set()

    def fault(attempt, items):
        if len(server.requests) > 8:  # the second iteration
            down_since.append(time.monotonic())
            refused.add(json.dumps(items))
            return "drop"
        return None

    with RewardServer(fault=fault) as server:
        overrides = [f"+reward.url={server.url}", f"+reward.timeout_seconds={budget}", *layout]
        results = run_ranks(failed_run, 2, tmp_path / "run", *overrides)
        ended = time.monotonic()
    # Sampling the rest of the iteration and ending two processes take their time too.
    assert ended - down_since[0] < budget + 6
    # Nor does anything wait for a second budget: the 64 outputs after those that failed are not sent at all.
    assert len(refused) <= (4 if layout else 8)
    (message,) = {message for message, _ in results}
    path = tmp_path / "run" / "failed_rollout.jsonl"
    assert message.startswith(
        f"the reward HTTPReward of {server.url} failed with ConnectionError: reward: {server.url}: "
    )
    assert "no usable answer within reward.timeout_seconds=2" in message
    assert "on a batch of 64 from output 0: " in message and " to the prompt " in message
    assert message.endswith(f" (the 16 groups sampled in this iteration are in {path})")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == 16 and {line["iteration"] for line in lines} == {1}
    assert {len(line["outputs"]) for line in lines} == {8}
