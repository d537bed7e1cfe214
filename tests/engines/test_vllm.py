"""A real vLLM samples for us, and what it does that would be silently wrong is loud or mended. ``make test-engines``.

SmolLM2-135M on the CPU, in the environment that ENGINES names; one thread, few tokens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from models import SMOLLM2
from ranks import free_port, run_ranks
from toy_runs import QUIET, ROOT, composed
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_brain.config.brain import RemoteConfig
from nemo_brain.convert.command import main as convert
from nemo_brain.core.groups import Prompt
from nemo_brain.data.stop import Stop
from nemo_brain.report.metrics import read_metrics
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.run import run

ENGINES = os.environ.get("ENGINES", "")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not ENGINES, reason="make test-engines"),
]
WORKER = ROOT / "nemo_brain" / "sampling" / "vllm_worker"
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_SERVER_DEV_MODE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(WORKER),
}
OPTIONS = "--generation-config vllm --dtype float32 --max-model-len 256 --enforce-eager --block-size 32"
OPTIONS += " --no-enable-chunked-prefill --host 127.0.0.1 --served-model-name policy"
RELOAD = "{path: /collective_rpc, json: {method: reload_weights, kwargs: {weights_path: '{path}'}}}"
LOAD = "{path: /collective_rpc, json: {method: nemo_brain_load, kwargs: {path: '{path}'}}}"
RESET = "{path: '/reset_prefix_cache?reset_running_requests=true'}"
RUN = (
    f"data.train={ROOT}/tests/golden/prompts.jsonl",
    "data.validation=null",
    "data.holdout=0",
    "model.export_to=null",
    f"model.restore_from={SMOLLM2}",
    "rollout.prompts_per_iteration=2",
    "rollout.outputs_per_prompt=4",
    "rollout.max_new_tokens=12",
    "train.global_batch_size=2",
    "optim.lr=1e-4",
)


class VLLM:
    """A server process; ``restart`` starts another one at its address."""

    def __init__(self, model: Path, log: Path):
        self.log, self._port = log, free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        module = [f"{ENGINES}/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
        options = [*OPTIONS.split(), "--worker-extension-cls", "nemo_brain_vllm.Weights"]
        self._command = [*module, *options, "--model", str(model), "--port", str(self._port)]
        self._processes: list[subprocess.Popen] = []
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self._processes.append(
                subprocess.Popen(
                    self._command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
                )
            )

    def wait(self, seconds: float = 600) -> None:
        ended = time.monotonic() + seconds
        while time.monotonic() < ended:
            assert self._processes[-1].poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(httpx.RequestError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def terminate(self) -> None:
        """SIGTERM, after which vLLM waits for its connections."""
        self._processes[-1].send_signal(signal.SIGTERM)

    def stop(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def version(self) -> str:
        return httpx.get(f"{self.url}/weight_info").json()["weight_version"].partition(":")[0]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "model"
    run_ranks(convert, 1, [f"from={SMOLLM2}", f"to={path}", "dtype=fp32"])
    return path


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    running = VLLM(smollm2, tmp_path_factory.mktemp("vllm") / "log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture
def shared_memory():
    """A directory in shared memory: no disk is between the run and the server."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def metrics_of(url: str, export_to: Path, reload: str, *overrides: str, kept=None, **keys: str) -> list[dict]:
    """Of a run, whose directory is ``kept`` if it is to stay."""
    logging.disable(logging.WARNING)
    given = {"url": url, "model": "policy", "concurrency": 8, "export_to": export_to, "reload": f"[{reload}]", **keys}
    remote = "rollout.remote={" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = kept or Path(scratch, "run")
        run(composed("quickstart", f"run_dir={run_dir}", *QUIET, *RUN, remote, *overrides))
        return read_metrics(run_dir / "metrics.jsonl")


def test_every_iterations_policy_is_sampled_from_by_way_of_shared_memory(server, shared_memory):
    reload = f"{LOAD}, {RESET}"
    (metrics,) = run_ranks(metrics_of, 1, server.url, shared_memory / "policy", reload, "trainer.max_iterations=3")
    iterations = [record for record in metrics if record["kind"] == "iteration"]
    print([{k: record[k] for k in ("proposal_gap", "refresh_seconds", "sample_seconds")} for record in iterations])
    assert len(iterations) == 3
    # Two kernels' rounding over 12 tokens in fp32. A policy of one step more is 100 times as far away.
    assert all(record["proposal_gap"] < 1e-3 for record in iterations)
    assert iterations[2]["kl_to_prior"] != 0
    assert server.version().endswith("-2"), "the number of optimizer steps"


def test_outputs_sampled_ahead_have_the_log_probs_of_the_weights_that_drew_them(server, shared_memory, tmp_path):
    """Two iterations ahead, so that outputs are under way whenever new weights come: these have an older policy's
    log-probs up to a token, and a newer one's from there on."""
    policies, run_dir = shared_memory / "policies", tmp_path / "run"
    policies.mkdir()
    keep = f"{{command: [bash, -c, 'cp -r {{path}} {policies}/$(ls {policies} | wc -l)']}}"
    options = ("trainer.max_iterations=4", "rollout.ahead=2", "rollout.rescore_proposal=false")
    options += ("rollout.max_new_tokens=48", "rollout.outputs_per_prompt=8", "rollout.save=true")
    reload = f"{keep}, {LOAD}, {RESET}"
    keys = {"concurrency": "2", "kept": run_dir}
    (metrics,) = run_ranks(metrics_of, 1, server.url, shared_memory / "policy", reload, *options, **keys)
    iterations = [record for record in metrics if record["kind"] == "iteration"]
    print([{k: v for k, v in record.items() if k.startswith("ahead/") or "seconds" in k} for record in iterations])
    assert [record["ahead/steps"] > 0 for record in iterations] == [False, True, True, True]
    models = [
        AutoModelForCausalLM.from_pretrained(policies / str(step), dtype=torch.float32).eval() for step in range(4)
    ]
    unmatched, mixed = 0, 0
    for line in (run_dir / "rollouts.jsonl").read_text().splitlines():
        group = json.loads(line)
        for output in group["outputs"]:
            values = [token_logprobs(model, group["prompt_token_ids"], output["token_ids"]) for model in models]
            first, total = output["policy_step"], output["proposal_logprob"]
            sums = [
                math.fsum(values[first][:t] + values[last][t:])
                for last in range(first, 4)
                for t in range(1, len(output["token_ids"]) + 1)
            ]
            whole = abs(math.fsum(values[first]) - total) < 2e-3  # fp32, 48 tokens: 2e-5 each
            mixed += not whole and min(abs(value - total) for value in sums) < 2e-3
            unmatched += min(abs(value - total) for value in sums) >= 2e-3
    print("of two policies:", mixed, "unmatched:", unmatched)
    assert mixed > 0
    # Between the reload and the reset a token may be drawn by new weights from keys and values of the old ones.
    assert unmatched <= 2 * 3, "no more than are under way when weights come"


def token_logprobs(model: AutoModelForCausalLM, prompt: list[int], tokens: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_a_reload_that_leaves_the_tied_output_layer_ends_the_run(server, tmp_path):
    with pytest.raises(AssertionError, match=r"nats per token away from those of the policy.*it has other weights"):
        reload = f"{RELOAD}, {RESET}"
        run_ranks(metrics_of, 1, server.url, tmp_path / "policy", reload, "trainer.max_iterations=3", "optim.lr=1e-3")


def test_log_probs_of_another_law_than_the_sampled_end_the_run(server, tmp_path):
    with pytest.raises(AssertionError, match=r"log-probs at temperature 1 .*--logprobs-mode processed_logprobs"):
        options = ("trainer.max_iterations=1", "rollout.temperature=0.7")
        reload = f"{LOAD}, {RESET}"
        run_ranks(metrics_of, 1, server.url, tmp_path / "policy", reload, *options, logprobs="sampled")


def changed(smollm2: Path, target: Path) -> AutoModelForCausalLM:
    """Another model of its kind, whose embedding and tied output layer are other ones too."""
    shutil.copytree(smollm2, target)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(target)
    return model.eval()


def sampler(server: VLLM, smollm2: Path, directory: Path | None, tokens: int) -> RemoteSampler:
    config = RemoteConfig(url=server.url, model="policy", concurrency=8, timeout_seconds=600.0)
    load = {"method": "nemo_brain_load", "kwargs": {"path": "{path}"}}
    config.reload = [
        {"path": "/collective_rpc", "json": load},
        {"path": "/reset_prefix_cache?reset_running_requests=true"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    options = SamplingOptions(outputs=8, max_new_tokens=tokens, stop=Stop((tokenizer.eos_token_id,)))
    return RemoteSampler(config, options, tokenizer, len(tokenizer), 128, ServedWeights(directory, "a version"))


def largest_gap(model: AutoModelForCausalLM, group) -> float:
    """Between the server's log-probs and transformers', in nats."""
    gaps = []
    for output, theirs in zip(group.outputs, group.proposal_logprobs, strict=True):
        prompt, tokens = group.prompt.token_ids, output.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        gaps.append(abs(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item() - theirs))
    return max(gaps)


def prompts(smollm2: Path) -> list[Prompt]:
    text = "The weather of the coming week"
    return [Prompt("p", text, AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"])]


def test_a_directory_that_the_server_does_not_see_leaves_it_unharmed(server, smollm2):
    with pytest.raises(ValueError, match=r"reload\[0\].*this server sees no safetensors files in /gone"):
        sampler(server, smollm2, Path("/gone"), 4).refresh(reload=True)
    (answer,) = [a for a in sampler(server, smollm2, None, 4).sample(prompts(smollm2), 0, 0) if a is not None]
    assert len(answer[1].outputs) == 8


def test_a_server_that_is_started_again_meanwhile_gets_the_weights_and_its_requests_again(server, smollm2, tmp_path):
    """It is told to end while outputs are under way, which hang; another one takes its place with its start weights."""
    model = changed(smollm2, tmp_path / "policy")
    ours = sampler(server, smollm2, tmp_path / "policy", 100)
    started = time.monotonic()
    ours.refresh(reload=True)
    print("refresh from a disk:", time.monotonic() - started)
    assert server.version() == "a version"

    def end_and_start() -> None:
        time.sleep(0.5)
        server.terminate()
        with contextlib.suppress(httpx.RequestError):
            while httpx.get(f"{server.url}/health").is_success:
                time.sleep(0.2)
        server.start()

    threading.Thread(target=end_and_start).start()
    ((_, group),) = [answer for answer in ours.sample(prompts(smollm2), 0, 0) if answer is not None]
    assert len(server._processes) == 2 and server.version() == "a version"
    # fp32, 100 tokens: 2e-5 each. The start model is whole nats away.
    assert largest_gap(model, group) < 2e-3
    assert largest_gap(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), group) > 0.1
