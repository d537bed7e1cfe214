"""The `trl` table: BRAIn's training step and iteration against TRL's, from the same weights and tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks import common, models
from benchmarks.sampling import sampled_groups, text_prompts, transformers_model
from nemo_brain.core.groups import Group, Output, Prompt, ScoredGroup
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.data.stop import Stop
from nemo_brain.objectives import make_objective
from nemo_brain.sampling.sampler import Sampler, SamplingOptions
from nemo_brain.training.brain.passes import BRAInPasses, Scores
from nemo_brain.training.brain.prior import ResidentPrior

PYTHON = common.ROOT / "benchmarks" / ".venv-trl" / "bin" / "python"
TITLE = "Training step and iteration, against TRL"
METHOD = """
SmolLM2-135M-Instruct in both, fp32, one thread each, in two processes that take turns. TRL has an environment of its
own (`bash benchmarks/install_trl.sh`), with the newer transformers that it wants. Both train all weights with AdamW
and gradient clipping on the same prompt and the same given outputs, one group per step.

Settings of TRL: gradient checkpointing off (it is off for BRAIn too), torch's fused attention, the whole group in one
batch, TRL's fused log-prob head at the completion's positions, no padding (all outputs have one length), all else as
it comes. A step is `training_step`, `clip_grad_norm_` and the optimizer's step, as `Trainer.train` makes them. BRAIn:
shared-prefix rows, one pass, planning and packing included.

The reference model's forward pass is in no step: TRL's RLOO and GRPO make it while scoring (beta = 0.05 for both),
for DPO `precompute_ref_log_probs=True`; BRAIn scores its prior once per rollout. An iteration is sampling of one
group without an end token, scoring by policy and reference (prior), rewards from a trivial function, and one step;
TRL's is RLOO's, with generation by transformers. BRAIn samples with `Sampler`, scores log p and log q' by the
training kernels, and trains.

Extra memory: the peak beyond what the process holds before the step (weights, optimizer state). Tokens per second
count the outputs' tokens.
"""
TARGET = 0.33
SHAPE, PAIR = (400, 50, 8), (400, 50, 2)
KINDS = {"rloo": "RLOO", "grpo": "GRPO"}


def measure(smoke: bool) -> dict:
    if not PYTHON.exists():
        raise RuntimeError(f"{PYTHON} is missing: bash benchmarks/install_trl.sh makes it")
    size = "toy" if smoke else models.SMOLLM2
    shapes = ((20, 4, 4), (20, 4, 2)) if smoke else (SHAPE, PAIR)
    measured = common.fresh(_all, size, shapes, 1 if smoke else 3)
    rows, targets = [], []
    for case in measured["cases"]:
        tokens = case["tokens"]
        ours, theirs = case["times"]["BRAIn"], case["times"][case["against"]]
        for name, times in case["times"].items():
            rows.append(
                {
                    "what": case["what"],
                    "shape": case["shape"],
                    "name": name,
                    "seconds": common.spread(times),
                    "rate": common.spread([tokens / seconds for seconds in times]),
                    "ratio": common.ratio(ours, times),
                    "memory": case["memory"][name],
                }
            )
        if case["what"] == "step" and tuple(case["shape"]) == shapes[0]:
            what = f"BRAIn's step / TRL's ({case['against']}), {size}, {case['shape']}"
            targets.append({"what": what, "value": common.ratio(ours, theirs), "at_most": TARGET})
    columns = [
        ("what", "what", "text"),
        ("shape", "(prompt, output, n)", "text"),
        ("name", "by", "text"),
        ("seconds", "seconds", "seconds"),
        ("rate", "output tokens/s", "rate"),
        ("ratio", "BRAIn / this, seconds", "ratio"),
        ("memory", "extra memory", "bytes"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    return {
        "parts": [{"text": f"TRL's environment: {versions}.", "columns": columns, "rows": rows}],
        "targets": targets,
    }


class Worker:
    """A process of TRL's environment that holds one trainer; ``calls`` become cases of ``common.interleaved``."""

    def __init__(self, kind: str, model: Path):
        self.peak = 0
        self.versions: dict[str, str] = {}
        command = [str(PYTHON), "-P", str(Path(__file__).with_name("trl_worker.py")), kind, str(model)]
        ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def ask(self, do: str, **options) -> float:
        """The seconds that it took, without the way there and back."""
        self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"TRL's process ended:\n{self._log.read()[-4000:]}")
        answer = json.loads(line)
        self.peak, self.versions = answer["peak"], answer["versions"]
        return answer["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _all(size: str, shapes, repeats: int) -> dict:
    models.start()
    model = models.build(size)
    prior, *_ = models.bare(size)
    directory = Path(tempfile.mkdtemp())
    transformers_model(size).save_pretrained(directory)
    _tokenizer(model).save_pretrained(directory)
    cases, versions = [], {}
    for kind, label in list(KINDS.items())[: 1 if size == "toy" else None]:
        worker = Worker(kind, directory)
        against = f"TRL {label}"
        cases.append(_step(model, worker, against, size, shapes[0], repeats))
        if kind == "rloo":
            cases.append(_iteration(model, prior, worker, against, size, shapes[0], max(1, repeats - 2)))
        worker.close()
    worker = Worker("dpo", directory)
    cases.append(_step(model, worker, "TRL DPO", size, shapes[1], repeats))
    versions = worker.versions
    worker.close()
    return {"cases": cases, "versions": versions}


def _tokenizer(model: models.Trainable) -> PreTrainedTokenizerFast:
    from nemo_brain.data.tokenizers import byte_tokenizer

    tokenizer = model.weights.tokenizer or byte_tokenizer()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _group(size: str, shape: tuple[int, int, int]) -> ScoredGroup:
    """A group of real text: prompt and outputs are pieces of this repository's documents."""
    prompt, output, n = shape
    tokens = text_prompts(size, n, prompt + output)
    (scored,) = models.groups_of(1, prompt, output, n, vocab=1)
    outputs = [Output(piece.token_ids[-output:], "", True) for piece in tokens]
    return dataclasses.replace(scored, prompt=Prompt("p", "", tokens[0].token_ids[:prompt]), outputs=outputs)


def _request(group: Group) -> dict:
    return {"prompt": group.prompt.token_ids, "outputs": [output.token_ids for output in group.outputs]}


def _step(model, worker: Worker, against: str, size: str, shape, repeats: int) -> dict:
    small, group = _group(size, (8, 4, shape[2])), _group(size, shape)
    ours = common.Meter(models.brain_step(model, [group], "shared_prefix"))
    # Warm both with a small group: kernels and the optimizer's state are there then.
    models.brain_step(model, [small], "shared_prefix")()
    worker.ask("load", **_request(small))
    worker.ask("step")
    worker.ask("load", **_request(group))
    times = common.interleaved(
        {"BRAIn": ours, against: lambda: worker.ask("step")}, repeats, seconds=260, warm_up=False
    )
    tokens = sum(len(output.token_ids) for output in group.outputs)
    positions = chunk_tokens(group, range(shape[2]), "shared_prefix")
    memory = {"BRAIn": ours.peak, against: worker.peak}
    return dict(
        what="step", shape=shape, times=times, tokens=tokens, against=against, memory=memory, positions=positions
    )


def _iteration(model, prior, worker: Worker, against: str, size: str, shape, repeats: int) -> dict:
    group = _group(size, shape)
    ours = common.Meter(_brain_iteration(model, prior, group.prompt, shape))
    worker.ask("load", **_request(group))
    cases = {"BRAIn": ours, against: lambda: worker.ask("iterate", new_tokens=shape[1])}
    times = common.interleaved(cases, repeats, seconds=260, warm_up=False)
    memory = {"BRAIn": ours.peak, against: worker.peak}
    return dict(what="iteration", shape=shape, times=times, tokens=shape[1] * shape[2], against=against, memory=memory)


def _brain_iteration(model, prior, prompt: Prompt, shape) -> Callable[[], None]:
    """Sampling, scoring and a step as the loop makes them, without its files."""
    _, output, n = shape
    frozen = ResidentPrior([prior])
    passes = BRAInPasses(model.config, "shared_prefix", 16384)
    objective = make_objective("brain", gamma=0.1)
    decode = getattr(model.weights.tokenizer, "decode", lambda ids, **_: str(ids))
    tokenizer = SimpleNamespace(decode=decode)
    options = SamplingOptions(outputs=n, max_new_tokens=output, stop=Stop(()))

    def iterate() -> None:
        groups = sampled_groups(Sampler(model.chunks, model.config, tokenizer, options), [prompt], iteration=0)
        with frozen.chunks(model.chunks) as chunks:
            prior_GN = passes.logprobs(chunks, groups)[0]
        policy_GN = passes.logprobs(model.chunks, groups)[0]
        scored = [
            ScoredGroup(
                group.prompt,
                group.outputs,
                rewards=[float(i % 3) for i in range(n)],
                prior_logprobs=prior,
                proposal_logprobs=policy,
                policy_logprobs=policy,
            )
            for group, prior, policy in zip(groups, prior_GN.tolist(), policy_GN.tolist(), strict=True)
        ]
        scores = Scores.of(scored, keep_truncated=True)
        model.step(lambda: passes.train(model.chunks, scored, scores, objective, policy_GN))

    return iterate
