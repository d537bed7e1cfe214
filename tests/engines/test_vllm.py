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
import subprocess
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from models import ONE, SMOLLM2, build, forward, servable_llama
from ranks import free_port, run_ranks
from safetensors.torch import save_file
from toy_runs import QUIET, ROOT, composed
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.vllm_server import ENVIRONMENT, LOAD, RESET, VLLM
from nemo_brain.config.remote import RemoteConfig
from nemo_brain.convert.command import main as convert
from nemo_brain.convert.export import gathered_tensors, make_export
from nemo_brain.convert.open import open_weights
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import load_weights
from nemo_brain.report.metrics import read_metrics
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.transfer import Transfer
from nemo_brain.training.brain.run import run

ENGINES = os.environ.get("ENGINES", "")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not ENGINES, reason="make test-engines"),
]
RELOAD = "{path: /collective_rpc, json: {method: reload_weights, kwargs: {weights_path: '{path}'}}}"
LETTERS = (
    "model.gpt=null",
    "trainer.max_iterations=20",
    "trainer.val_every_iterations=20",
    "data.holdout=32",
    "rollout.outputs_per_prompt=16",
)
SHOWN = ("reward/mean", "eval/reward", "proposal_gap", "refresh_seconds", "refresh_bytes", "refresh_bytes_per_second")
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


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "model"
    run_ranks(convert, 1, [f"from={SMOLLM2}", f"to={path}", "dtype=fp32"])
    return path


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    running = VLLM(f"{ENGINES}/bin/python", smollm2, tmp_path_factory.mktemp("vllm") / "log")
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


def metrics_of(url: str, *overrides: str, kept=None, of=("quickstart", *RUN), **keys: str) -> list[dict]:
    """Of a run, whose directory is ``kept`` if it is to stay; ``of``: a file of conf/ and overrides."""
    logging.disable(logging.WARNING)
    given = {"url": url, "model": "policy", "concurrency": 8, **keys}
    remote = "rollout.remote={" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = kept or Path(scratch, "run")
        name, *base = of
        run(composed(name, f"run_dir={run_dir}", *QUIET, *base, remote, *overrides))
        return read_metrics(run_dir / "metrics.jsonl")


def test_every_iterations_policy_is_sampled_from_by_way_of_shared_memory(server, shared_memory):
    keys = {"export_to": shared_memory / "policy", "reload": f"[{LOAD}, {RESET}]"}
    (metrics,) = run_ranks(metrics_of, 1, server.url, "trainer.max_iterations=3", **keys)
    iterations = [record for record in metrics if record["kind"] == "iteration"]
    print([{k: record[k] for k in ("proposal_gap", "refresh_seconds", "sample_seconds")} for record in iterations])
    assert len(iterations) == 3
    # Two kernels' rounding over 12 tokens in fp32. A policy of one step more is 100 times as far away.
    assert all(record["proposal_gap"] < 1e-3 for record in iterations)
    assert iterations[2]["kl_to_prior"] != 0
    assert server.version().endswith("-2"), "the number of optimizer steps"


def test_outputs_sampled_ahead_have_the_log_probs_of_the_weights_that_drew_them(server, shared_memory, tmp_path):
    """Two iterations ahead, so that outputs are under way whenever new weights come: these have an older policy's
    log-probs up to a token, and a newer one's from there on; from the first token on if they were begun after the
    reload and before the server had named its weights, until when they count as the older one's."""
    policies, run_dir = shared_memory / "policies", tmp_path / "run"
    policies.mkdir()
    keep = f"{{command: [bash, -c, 'cp -r {{path}} {policies}/$(ls {policies} | wc -l)']}}"
    options = ("trainer.max_iterations=4", "rollout.ahead=2", "rollout.rescore_proposal=false")
    options += ("rollout.max_new_tokens=48", "rollout.outputs_per_prompt=8", "rollout.save=true")
    keys = {"export_to": shared_memory / "policy", "reload": f"[{keep}, {LOAD}, {RESET}]"}
    keys |= {"concurrency": "2", "kept": run_dir}
    (metrics,) = run_ranks(metrics_of, 1, server.url, *options, **keys)
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
                for t in range(len(output["token_ids"]) + 1)
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
        keys = {"export_to": tmp_path / "policy", "reload": f"[{RELOAD}, {RESET}]"}
        run_ranks(metrics_of, 1, server.url, "trainer.max_iterations=3", "optim.lr=1e-3", **keys)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A model that learns to write letters (conf/toy.yaml) in seconds."""
    return servable_llama(tmp_path_factory.mktemp("small"))


def rising(metrics: list[dict]) -> list[dict]:
    """The iterations of a run whose rewards on held-out prompts have risen beyond their intervals."""
    first, last = [record for record in metrics if record["kind"] == "eval"]
    print(*[{k: v for k, v in record.items() if k in SHOWN} for record in metrics], sep="\n")
    assert last["eval/reward_difference_ci_low"] > 0.03 and first["eval/kl_to_prior"] == 0
    iterations = [record for record in metrics if record["kind"] == "iteration"]
    # Two kernels' rounding over 8 tokens in fp32; the policy is nats away from the first by the end.
    assert len(iterations) == 20 and all(record["proposal_gap"] < 1e-4 for record in iterations)
    return iterations


def test_a_run_over_a_process_group_gets_a_higher_reward(small, tmp_path):
    """With adapters, so that after the first time only their layers are sent; four outputs to a request."""
    server = VLLM(f"{ENGINES}/bin/python", small, tmp_path / "log")
    try:
        server.wait()
        options = (f"model.restore_from={small}", "model.peft={dim: 16}", "prior.placement=adapter_off")
        given = {"transfer": "process_group", "outputs_per_request": "4", "of": ("toy", *LETTERS)}
        (metrics,) = run_ranks(metrics_of, 1, server.url, *options, **given)
    finally:
        server.stop()
    first, *later = [record["refresh_bytes"] for record in rising(metrics)]
    model = AutoModelForCausalLM.from_pretrained(small)
    touched = sum(p.nbytes for name, p in model.named_parameters() if "norm" not in name and "embed" not in name)
    # The first iteration's weights have come for the validation before it.
    assert first == 0 and set(later) == {touched}


def test_log_probs_of_another_law_than_the_sampled_end_the_run(server):
    with pytest.raises(AssertionError, match=r"log-probs at temperature 1 .*--logprobs-mode processed_logprobs"):
        options = ("trainer.max_iterations=1", "rollout.temperature=0.7")
        run_ranks(metrics_of, 1, server.url, *options, transfer="process_group", logprobs="sampled")


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


def sampler(server: VLLM, smollm2: Path, directory: Path | None, tokens: int, *others: VLLM, **keys) -> RemoteSampler:
    urls = [one.url for one in (server, *others)]
    config = RemoteConfig(url=urls, model="policy", concurrency=8, timeout_seconds=600.0, **keys)
    if config.transfer == "directory":
        load = {"method": "nemo_brain_load", "kwargs": {"path": "{path}"}}
        config.reload = [
            {"path": "/collective_rpc", "json": load},
            {"path": "/reset_prefix_cache?reset_running_requests=true"},
        ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    options = SamplingOptions(outputs=8, max_new_tokens=tokens, stop=Stop((tokenizer.eos_token_id,)))
    # Without either it is asked for outputs of whatever weights it has.
    version = None if directory is None and config.transfer == "directory" else "a version"
    return RemoteSampler(config, options, tokenizer, len(tokenizer), 128, ServedWeights(directory, version))


def give(ours: RemoteSampler, model: AutoModelForCausalLM, names: str = "") -> list[str]:
    """Sends the servers that wait the model's tensors whose names have this in them, over process groups."""
    ours.refresh(reload=True)
    transfer = Transfer(ours.waiting, "a version")
    for name, parameter in model.named_parameters():
        if names in name:
            transfer.add(name, parameter.detach())
    return transfer.finish()


def drawn(ours: RemoteSampler, smollm2: Path) -> SampledGroup:
    ((_, group),) = [answer for answer in ours.sample(prompts(smollm2), 0, 0) if answer is not None]
    return group


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


def test_each_way_gives_a_server_the_weights(server, smollm2, shared_memory, tmp_path):
    """Exactly, however small the part of them that has changed; how long it takes is printed."""
    model = changed(smollm2, tmp_path / "policy")
    shutil.copytree(smollm2, shared_memory / "start")
    start = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    by_group = {"transfer": "process_group"}
    ways = {
        "a directory on a disk": (sampler(server, smollm2, smollm2, 12), start),
        "a process group": (sampler(server, smollm2, None, 12, **by_group), model),
        "a directory in shared memory": (sampler(server, smollm2, shared_memory / "start", 12), start),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, (ours, weights) in ways.items():
            started = time.perf_counter()
            give(ours, weights) if way == "a process group" else ours.refresh(reload=True)
            seconds[way].append(round(time.perf_counter() - started, 2))
            if len(seconds[way]) == 1:
                assert largest_gap(weights, drawn(ours, smollm2)) < 1e-3, way  # fp32, 12 tokens: 2e-5 each
    print("load", os.getloadavg()[0], seconds)
    with torch.no_grad():
        for layer in start.model.layers:
            layer.mlp.down_proj.weight.mul_(0.9)
    ours = ways["a process group"][0]
    give(ours, start, ".mlp.down_proj.")
    assert largest_gap(start, drawn(ours, smollm2)) < 1e-3


def test_outputs_of_one_request_are_those_of_single_requests(server, smollm2):
    single, together = (
        drawn(sampler(server, smollm2, None, 16, outputs_per_request=count), smollm2) for count in (1, 4)
    )
    tokens = [output.token_ids for output in single.outputs]
    assert [output.token_ids for output in together.outputs] == tokens
    assert len({tuple(ids) for ids in tokens}) > 4


def test_a_killed_server_is_left_out_and_taken_back_with_the_weights(server, smollm2, tmp_path):
    model = changed(smollm2, tmp_path / "policy")
    other = VLLM(f"{ENGINES}/bin/python", smollm2, tmp_path / "log")
    try:
        other.wait()
        ours = sampler(server, smollm2, None, 64, other, transfer="process_group", outputs_per_request=2)
        assert give(ours, model) == [server.url, other.url]
        threading.Timer(0.5, other.stop).start()
        assert largest_gap(model, drawn(ours, smollm2)) < 2e-3
        assert ours.refresh(reload=False) == [server.url] and not ours.waiting
        other.start()
        other.wait()
        assert ours.refresh(reload=False) == [server.url, other.url]
        assert [waiting.url for waiting in ours.waiting] == [other.url]
        assert give(sampler(other, smollm2, None, 64, transfer="process_group"), model) == [other.url]
        assert largest_gap(model, drawn(sampler(other, smollm2, None, 64), smollm2)) < 2e-3
    finally:
        other.stop()


def a_policy(seed: int) -> list:
    """This rank's chunks of SmolLM2 with other weights than it has."""
    weights = open_weights(SMOLLM2)
    chunks = build(weights.gpt_config, weights.vocab_size, ONE)
    load_weights(chunks, weights)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter += 0.02 * seed * parameter.std() * torch.randn_like(parameter)
    return chunks


def gathered_policies(seeds: list[int], target: Path) -> None:
    """What the training hands its engine: config.json and the tokenizer, and each policy's tensors in a file."""
    weights = open_weights(SMOLLM2)
    for seed in seeds:
        chunks = a_policy(seed)
        export = make_export(chunks[0].config, weights.vocab_size, weights.tokenizer, "test")
        tensors = {name: tensor.contiguous() for name, tensor in gathered_tensors(chunks, export, everywhere=True)}
        save_file(tensors, target / f"{seed}.safetensors")
    export.config.save_pretrained(target / "files")
    weights.tokenizer.save_pretrained(target / "files")


def scored_by_training(seeds: list[int], prompt: list[int], outputs: dict[int, list[list[int]]]) -> dict:
    """Each policy's log-probs of outputs at temperature 0.7, by Megatron."""
    found = {}
    for seed in seeds:
        chunks = a_policy(seed)
        tokens = torch.tensor([prompt + output for output in outputs[seed]])
        with torch.no_grad():
            logits = forward(chunks, tokens)[:, len(prompt) - 1 : -1] / 0.7
        logits = logits[..., : open_weights(SMOLLM2).vocab_size]
        found[seed] = logits.log_softmax(-1).gather(2, tokens[:, len(prompt) :, None])[..., 0].tolist()
    return found


def test_an_engine_in_the_process_has_each_policy_that_it_is_handed(smollm2, tmp_path):
    """Its tied output layer too. What it samples is the policy's law at the temperature, and the same again."""
    (prompt,) = prompts(smollm2)
    seeds = [1, 2]
    run_ranks(gathered_policies, 1, seeds, tmp_path)
    program = [f"{ENGINES}/bin/python", str(ROOT / "tests" / "engines" / "in_process.py"), str(tmp_path / "files")]
    files = [str(tmp_path / f"{seed}.safetensors") for seed in seeds]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    result = tmp_path / "result.json"
    done = subprocess.run([*program, str(result), json.dumps(prompt.token_ids), *files], env=environment, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    print("seconds of handing over", [policy["seconds"] for policy in found["policies"]])
    choices = {seed: policy["choices"] for seed, policy in zip(seeds, found["policies"], strict=True)}
    outputs = {seed: [choice["token_ids"] for choice in chosen] for seed, chosen in choices.items()}
    (ours,) = run_ranks(scored_by_training, 1, seeds, prompt.token_ids, outputs)
    for seed in seeds:
        theirs = torch.tensor([choice["logprobs"]["token_logprobs"] for choice in choices[seed]])
        assert (theirs - torch.tensor(ours[seed])).abs().max() < 2e-4  # fp32, over a temperature of 0.7
    assert outputs[1] != outputs[2] and found["again"] == choices[2]
    assert found["stopped"] == 0, "asked to stop after 16 steps of 200"


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["model.pipeline_model_parallel_size=2", "rollout.temperature=0.8"]),
        (4, ["model.tensor_model_parallel_size=2", "model.peft={dim: 16}"]),
    ],
    ids=["PP2, another temperature", "TP2 x DP2, adapters"],
)
def test_a_run_with_the_engine_in_its_processes_gets_a_higher_reward(ranks, overrides, small, tmp_path):
    """Where two packages' versions differ vLLM's is taken, which is in the same process."""
    program = [f"{ENGINES}/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program += [str(ROOT / "tests" / "engines" / "colocated_run.py"), sysconfig.get_path("purelib"), "toy"]
    options = "{enforce_eager: true, block_size: 32, enable_chunked_prefill: false}"
    keys = [f"run_dir={tmp_path}", f"model.restore_from={small}", *LETTERS, *overrides]
    keys += ["rollout.engine=colocated", f"rollout.colocated_options={options}"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*program, *keys], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-6000:]
    size = 4 * AutoModelForCausalLM.from_pretrained(small).num_parameters()
    assert {record["refresh_bytes"] for record in rising(read_metrics(tmp_path / "metrics.jsonl"))} == {size}


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
    group = drawn(ours, smollm2)
    assert len(server.processes) == 2 and server.version() == "a version"
    # fp32, 100 tokens: 2e-5 each. The start model is whole nats away.
    assert largest_gap(model, group) < 2e-3
    assert largest_gap(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), group) > 0.1
