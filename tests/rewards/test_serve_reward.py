"""The reward server as examples/serve_reward.py starts it: its scores, its refusals, its batches, its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ranks import free_port
from scored_models import CLOSE, OUTPUTS, PROMPTS, chat_ids, one_by_one, save_reward_model, scores, user
from toy_runs import ROOT, composed

from nemo_brain.config.serve_reward import check_serve
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.http import HTTPReward
from nemo_brain.rewards.server import ItemError, parse_items

SECONDS = 60  # for a start or an end on a busy machine

FUNCTIONS = """
import os, time

calls = open(os.environ["CALLS"], "a", buffering=1)

def length(prompts, outputs, *, references, metadata):
    calls.write(f"{len(outputs)}\\n")
    time.sleep(float(os.environ.get("PAUSE", 0)))
    if "bad" in outputs:
        raise KeyError("bad output")
    return [float(len(output)) for output in outputs]

class Slow:
    def load(self):
        time.sleep(1.5)

    def __call__(self, prompts, outputs, *, references, metadata):
        return [0.0] * len(outputs)

class Broken:
    def load(self):
        raise RuntimeError("no such weights")

    __call__ = Slow.__call__

class Collective(Slow):
    collective = True
"""


class Server:
    """examples/serve_reward.py in a process of its own."""

    def __init__(self, tmp_path: Path, *overrides: str, **environment: str):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.calls = tmp_path / "calls"
        self.log = (tmp_path / "log").open("w+")
        (tmp_path / "served_rewards.py").write_text(FUNCTIONS)
        variables = {"CALLS": str(self.calls), "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "examples" / "serve_reward.py"),
                f"port={self.url.rpartition(':')[2]}",
                *overrides,
            ],
            stdout=self.log,
            stderr=self.log,
            cwd=tmp_path,
            env={**os.environ, **variables, **environment},
        )

    def wait_for(self, path: str, status: int = 200) -> None:
        ended = time.monotonic() + SECONDS
        while time.monotonic() < ended and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + path).status_code == status:
                    return
            time.sleep(0.02)
        raise AssertionError(f"{path} never answered {status}: {self.output()}")

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def post(self, *outputs: str, **options) -> httpx.Response:
        items = {"items": [{"prompt": "p", "output": output} for output in outputs]}
        return httpx.post(f"{self.url}/score", **{"json": items, "timeout": SECONDS, **options})

    def called_with(self) -> list[int]:
        return [int(line) for line in self.calls.read_text().split()] if self.calls.exists() else []


@contextlib.contextmanager
def served(tmp_path: Path, *overrides: str, **environment: str) -> Iterator[Server]:
    server = Server(tmp_path, *overrides, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.log.close()


LENGTH = (
    "reward._target_=nemo_brain.rewards.function.FunctionReward",
    "reward.model=null",
    "+reward.function=served_rewards.length",
)


def target(name: str) -> list[str]:
    return [f"reward._target_=served_rewards.{name}", "reward.model=null"]


def test_every_way_to_the_same_model_gives_the_same_scores(tmp_path):
    """Directly, over HTTP and as a weighted sum: what transformers gives one by one."""
    path = save_reward_model("llama", tmp_path / "model")
    expected = one_by_one(path, [chat_ids(path, user(p), o) for p, o in zip(PROMPTS, OUTPUTS, strict=True)])
    huggingface = {"_target_": "nemo_brain.rewards.huggingface.HuggingFaceReward", "model": str(path)}
    messages = [{"role": "system", "content": "Be brief."}, *user("hi")]
    with served(tmp_path, f"reward.model={path}") as server:
        server.wait_for("/ready")
        http = {"_target_": "nemo_brain.rewards.http.HTTPReward", "url": server.url, "batch_size": 2}
        parts = [{**huggingface, "weight": 0.25}, {**http, "weight": 0.75}]
        weighted = {"_target_": "nemo_brain.rewards.weighted.WeightedReward", "rewards": parts}
        for section in (huggingface, http, weighted):
            reward = make_reward(section)
            assert scores(reward) == pytest.approx(expected, **CLOSE)
            (value,) = scores(reward, ["what the policy saw"], ["yes"], [{"messages": messages}])
            assert value == pytest.approx(one_by_one(path, [chat_ids(path, messages, "yes")])[0], **CLOSE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "model", "served_rewards.py"], "no files of Hydra's"


def test_requests_at_the_same_time_share_a_call(tmp_path):
    # A call waits for so long that it comes when it is full, however slow the machine.
    with served(tmp_path, *LENGTH, "max_batch=8", "batch_wait_seconds=50") as server:
        server.wait_for("/ready")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: server.post("x" * i, "y").json(), range(8)))
            assert answers == [{"rewards": [float(i), 1.0]} for i in range(8)]
            assert server.called_with() == [8, 8], "as many as fit, and no more"
            assert server.post(*["x"] * 20).json() == {"rewards": [1.0] * 20}
            assert server.called_with()[-1] == 20, "a larger request is a call of its own"
            # One request's failure is not the others'.
            answers = list(pool.map(lambda texts: server.post(*texts), [["a", "bb"], ["ccc", "bad"], ["dddd"] * 4]))
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert (answers[0].json(), answers[2].json()) == ({"rewards": [1.0, 2.0]}, {"rewards": [4.0] * 4})
        error = answers[1].json()["error"]
        assert error["item"] == 1
        assert error["message"] == (
            "the reward served_rewards.length failed with KeyError: 'bad output', on output 1: 'bad' to the prompt 'p'"
        )
        reward = HTTPReward(server.url, batch_size=8, concurrency=1)
        with pytest.raises(
            ValueError, match=rf"{server.url}: .*HTTP 500: .*'bad output'.*, on output 10: 'bad' to the"
        ):
            scores(reward, ["p"] * 16, [*["a"] * 10, "bad", *["a"] * 5])


def test_health_and_readiness(tmp_path):
    with served(tmp_path, *target("Slow")) as server:
        server.wait_for("/health")
        ready = httpx.get(server.url + "/ready")
        assert (ready.status_code, ready.json()["error"]["message"]) == (503, "the reward is being loaded")
        assert server.post("a").status_code == 503
        # A client waits.
        assert scores(HTTPReward(server.url)) == [0.0] * 5
        assert httpx.get(server.url + "/ready").json() == {"status": "ready"}
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        nothing = httpx.get(server.url + "/nothing")
        assert (nothing.status_code, nothing.json()["error"]["message"]) == (404, "Not Found")
        assert httpx.get(server.url + "/score").status_code == 405


def test_a_key_is_asked_for_where_there_is_one(tmp_path):
    with served(tmp_path, *LENGTH, "api_key_env=MY_KEY", MY_KEY="s3cret-key") as server:
        server.wait_for("/ready")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret-key"}, {"Authorization": "é"}):
            answer = server.post("a", headers={name: value.encode() for name, value in headers.items()})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "error" in answer.json()
        with pytest.raises(ValueError, match=r"HTTP 401: .*environment variable that reward\.api_key_env names"):
            scores(HTTPReward(server.url), ["p"], ["x" * 20_000_000])
        assert not server.called_with()
        assert server.post("a", headers={"Authorization": "Bearer s3cret-key"}).json() == {"rewards": [1.0]}
        assert "s3cret" not in server.output()


def chunks(size: int) -> Iterator[bytes]:
    """A body whose length no header tells."""
    for _ in range(size // 100_000):
        yield b" " * 100_000


def test_requests_are_checked(tmp_path):
    with served(tmp_path, *LENGTH, "max_request_bytes=1000") as server:
        server.wait_for("/ready")
        assert server.post("a" * 900).status_code == 200
        for large in ({"json": {"items": ["a" * 1000]}}, {"json": None, "content": chunks(20_000_000)}):
            answer = server.post(**large)
            assert answer.status_code == 413
            assert (
                answer.json()["error"]["message"]
                == "the request has more than max_request_bytes=1000: send fewer items"
            )
        with pytest.raises(ValueError, match=r"HTTP 413: .*more than max_request_bytes=1000"):
            scores(HTTPReward(server.url), ["p"], ["x" * 20_000_000])
        answer = server.post(json=None, content=b'{"items": [')
        assert answer.status_code == 400 and "the request is no JSON" in answer.json()["error"]["message"]
        answer = server.post(json={"items": [{"prompt": "a", "output": "b"}, {"prompt": "a"}]})
        assert (answer.status_code, answer.json()["error"]["item"]) == (422, 1)
        assert server.post().json() == {"rewards": []}
        assert server.called_with() == [1]


ITEM = {"prompt": "a", "output": "b"}


@pytest.mark.parametrize(
    ("body", "item", "message"),
    [
        ([], None, 'send {"items": [{"prompt": ..., "output": ...}, ...]}'),
        ({"items": {}}, None, 'send {"items"'),
        ({"items": [], "model": "x"}, None, 'send {"items"'),
        ({"items": [ITEM, "x"]}, 1, "items[1] must have prompt and output, and may have reference and metadata"),
        ({"items": [{**ITEM, "weight": 1}]}, 0, "items[0] must have prompt and output"),
        ({"items": [{**ITEM, "output": None}]}, 0, "items[0].output must be a string"),
        ({"items": [{**ITEM, "reference": 3}]}, 0, "items[0].reference must be a string"),
        ({"items": [{**ITEM, "metadata": []}]}, 0, "items[0].metadata must be an object"),
        ({"items": [{**ITEM, "prompt": "\ud800"}]}, 0, "items[0].prompt has half of a surrogate pair"),
    ],
)
def test_bad_items_are_named(body, item, message):
    with pytest.raises(ItemError) as caught:
        parse_items(json.dumps(body).encode())
    assert message in str(caught.value) and caught.value.index == item


def test_sigterm_ends_it_after_the_requests_that_it_has(tmp_path):
    with served(tmp_path, *LENGTH, "max_batch=1", PAUSE="0.2") as server:
        server.wait_for("/ready")
        connections = []
        for i in range(8):
            connections.append(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS))
            body = json.dumps({"items": [{"prompt": "p", "output": "x" * i}]})
            connections[-1].request("POST", "/score", body)
        server.wait_for("/health")  # so the server has read the earlier ones
        assert len(server.called_with()) < 8
        server.process.send_signal(signal.SIGTERM)
        answers = [json.loads(connection.getresponse().read()) for connection in connections]
        assert answers == [{"rewards": [float(i)]} for i in range(8)]
        assert server.process.wait(SECONDS) == 0, server.output()
        assert server.called_with() == [1] * 8
        with pytest.raises(httpx.ConnectError):
            server.post("late")


def test_what_a_client_has_given_up_is_not_scored(tmp_path):
    """So that clients that ask again do not wait behind their own past."""
    with served(tmp_path, *LENGTH, "max_batch=1", PAUSE="3") as server:
        server.wait_for("/ready")
        with concurrent.futures.ThreadPoolExecutor(8) as pool, httpx.Client() as client:
            first = pool.submit(server.post, "x")
            while not server.called_with():
                time.sleep(0.01)
            for _ in range(5):
                with pytest.raises(httpx.ReadTimeout):
                    client.post(server.url + "/score", json={"items": [{"prompt": "p", "output": "y"}]}, timeout=0.1)
            assert not first.done()
            assert first.result().json() == {"rewards": [1.0]}
        assert server.post("xx").json() == {"rewards": [2.0]}
        assert server.called_with() == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "error: configuration key reward.model has no value: set it in the YAML or on the command line"),
        (["reward.model=/none"], "reward.model: there is no /none/config.json"),
        ([*LENGTH, "api_key_env=NOT_SET"], "error: api_key_env: the environment variable NOT_SET is not set"),
        (target("Broken"), "error: the reward Broken cannot be loaded: RuntimeError: no such weights"),
        (target("Collective"), "Collective is computed by all ranks of a run together, and the reward server calls"),
    ],
)
def test_what_cannot_be_served_ends_it_with_the_reason(tmp_path, overrides, message):
    with served(tmp_path, *overrides) as server:
        assert server.process.wait(SECONDS) == 1
        assert message in server.output() and "Traceback" not in server.output()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+prt=1", "unknown configuration key prt; did you mean port?"),
        ("+zzzzzz=1", "the known keys are in conf/serve_reward.yaml"),
        ("port=70000", "port must be at least 0 and at most 65535, not 70000"),
        ("max_batch=0", "max_batch must be at least 1, not 0"),
        ("max_request_bytes=0", "max_request_bytes must be at least 1, not 0"),
        ("batch_wait_seconds=-1", "batch_wait_seconds must be at least 0 and below 60, not -1"),
    ],
)
def test_keys_that_cannot_be_are_named(override, message):
    with pytest.raises(ValueError) as caught:
        check_serve(serve_config(override))
    assert message in str(caught.value)


def serve_config(*overrides: str):
    return composed("serve_reward", "reward.model=/model", *overrides)
