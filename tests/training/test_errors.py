"""What a user sees when something is wrong: every rank ends at once, non-zero, with a message that names the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from models import damaged_llama
from ranks import free_port, run_ranks
from toy_runs import QUIET, ROOT, toy_config

from nemo_brain.core.groups import RewardedGroup
from nemo_brain.data.rollouts import read_rollouts
from nemo_brain.data.stop import Stop
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.training.brain.run import run

PROGRAM = [str(ROOT / "examples" / "megatron_brain.py"), "--config-name", "toy"]
# Two iterations of one step each; without validation the reward is called once per iteration.
SMALL = (
    "trainer.max_iterations=2",
    "rollout.prompts_per_iteration=4",
    "rollout.outputs_per_prompt=2",
    "train.global_batch_size=4",
    "train.epochs_per_iteration=1",
    "data.holdout=0",
)
SECONDS = 300  # for a launch on a busy machine: importing NeMo alone takes up to a minute. A hang would take 30 minutes

REWARDS = """
import math, os
calls = 0

def raises(prompts, outputs, *, references, metadata):
    global calls
    calls += 1
    if calls >= 2:
        raise RuntimeError("the scorer is out of order")
    return [float(len(output)) for output in outputs]

def raises_on_rank_1(prompts, outputs, *, references, metadata):
    if os.environ["RANK"] == "1":
        raise KeyError("weights")
    return [0.0] * len(outputs)

def nan(prompts, outputs, *, references, metadata):
    return [math.nan if i == 3 else 1.0 for i in range(len(outputs))]

def short(prompts, outputs, *, references, metadata):
    return [1.0] * (len(outputs) - 1)

class Unloadable:
    def load(self):
        raise FileNotFoundError(f"no weights for rank {os.environ['RANK']}")

    __call__ = staticmethod(short)
"""


@pytest.fixture
def rewards(tmp_path):
    """Overrides that name a function of a user's own file."""
    file = tmp_path / "my_rewards.py"
    file.write_text(REWARDS)
    return lambda name: f"reward.function={file}:{name}"


class Launch:
    """A command that has been started, with torchrun where there are several ranks."""

    def __init__(self, *arguments: str, python: str | Path = sys.executable, ranks: int = 1):
        launcher = []
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, *launcher, *PROGRAM, *QUIET, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def result(self) -> tuple[int, str, str]:
        try:
            stdout, stderr = self.process.communicate(timeout=SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, stdout, stderr


def test_the_command_line_ends_with_the_message(tmp_path, rewards, warm_python):
    """A wrong value, an unknown key, and a reward that fails in the middle of a run on two ranks."""
    run_dir = tmp_path / "run"
    value = Launch("rollout.outputs_per_prompt=1", python=warm_python)
    key = Launch("rollot.save=true", python=warm_python)
    reward = Launch(*SMALL, f"run_dir={run_dir}", rewards("raises"), ranks=2)

    code, _, stderr = value.result()
    assert code == 1
    message = (
        "error: rollout.outputs_per_prompt must be at least 2, not 1: the objective takes nothing from smaller groups"
    )
    assert stderr.splitlines()[-1] == message
    assert "Traceback" not in stderr and "HYDRA_FULL_ERROR" not in stderr

    code, _, stderr = key.result()
    assert code == 1 and "Key 'rollot' is not in struct" in stderr and "Traceback" not in stderr

    code, stdout, stderr = reward.result()
    assert code != 0
    message = "my_rewards.py:raises failed with RuntimeError: the scorer is out of order, on "
    # torchrun ends the other rank as soon as one has ended, so it need not get to its own message.
    assert any(line.startswith("error: ") and message in line for line in stderr.splitlines()), stderr
    # What was recorded before stays: the first iteration, whole.
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [("step", 1), ("iteration", 1)]
    assert (run_dir / "config.yaml").exists() and len((run_dir / "samples.jsonl").read_text().splitlines()) == 4
    # And the screen shows no library's INFO: groups, buckets, configurations.
    for noise in ("[NeMo I", "Params for bucket", "Setting up optimizer", "Padded vocab_size", "GPU available"):
        assert noise not in stdout + stderr


def test_an_error_of_a_library_keeps_its_traceback(tmp_path, warm_python):
    """It may be our bug, or the library's: then the message alone is not enough."""
    launched = Launch(*SMALL, f"run_dir={tmp_path}/run", "+model.gpt.fp8_param=true", python=warm_python)
    code, _, stderr = launched.result()
    assert code == 1
    assert "Traceback" in stderr and "fp8_param must be used together with fp8 mode" in stderr


def failing(*overrides: str) -> tuple[str, float, bool]:
    """One rank's error, the seconds until it came, and whether the ranks had met by then."""
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        run(toy_config(*SMALL, *overrides))
    return str(caught.value), time.monotonic() - started, dist.is_initialized()


def refused(world_size: int, *overrides: str) -> str:
    """The message, which every rank must have raised by itself, without waiting for another."""
    results = run_ranks(failing, world_size, *overrides)
    messages = {message for message, _, _ in results}
    assert len(messages) == 1, messages
    assert all(seconds < 120 for _, seconds, _ in results)
    return messages.pop()


REFUSED_BY_REWARD = {
    "raises": ("failed with RuntimeError: the scorer is out of order", "output"),
    "raises_on_rank_1": ("failed with KeyError: 'weights'", "output"),
    "nan": ("nan", "output"),
    "short": ("returned 3 rewards for 4 outputs", "one number per output"),
}


@pytest.mark.parametrize("name", REFUSED_BY_REWARD)
def test_a_reward_fails_on_every_data_parallel_rank(name, rewards, tmp_path):
    """Each rank rewards its own outputs, and the error of one is the error of all."""
    message = refused(2, f"run_dir={tmp_path}/run", rewards(name))
    assert f"my_rewards.py:{name}" in message
    for part in REFUSED_BY_REWARD[name]:
        assert part in message
    # What was sampled is not lost, nor are the rewards that were computed; offline training takes it.
    path = tmp_path / "run" / "failed_rollout.jsonl"
    assert message.endswith(f"(the 4 groups sampled in this iteration are in {path})")
    groups = read_rollouts(
        path, tokenizer=byte_tokenizer(), stop=Stop((256,)), template=None, max_prompt_tokens=32, max_new_tokens=8
    )
    assert len({group.prompt.id for group in groups}) == 4
    rewarded = [isinstance(group, RewardedGroup) for group in groups]
    assert rewarded == ([True, True, False, False] if name == "raises_on_rank_1" else [False] * 4)


def test_a_reward_fails_on_every_model_parallel_rank(rewards, tmp_path):
    """There one rank calls the reward for all."""
    message = refused(2, f"run_dir={tmp_path}/run", rewards("short"), "model.tensor_model_parallel_size=2")
    assert "returned 7 rewards for 8 outputs" in message


def test_outputs_of_another_law_than_the_training_kernels_end_the_run_and_are_kept(tmp_path):
    """The two kernels of one model differ by rounding: more than this bound allows."""
    message = refused(2, f"run_dir={tmp_path}/run", "rollout.max_proposal_gap=1e-12")
    assert "nats per token on average, and rollout.max_proposal_gap is 1e-12" in message
    path = tmp_path / "run" / "failed_rollout.jsonl"
    assert message.endswith(f"(the 4 groups sampled in this iteration are in {path})")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4 and all("reward" in output for line in lines for output in line["outputs"])


def test_a_reward_that_cannot_be_loaded_is_named_before_anything_is_sampled(rewards, tmp_path, monkeypatch):
    """Only the rank that calls it loads it, and all of them end."""
    rewards("short")
    monkeypatch.syspath_prepend(tmp_path)
    target = ["reward._target_=my_rewards.Unloadable", "reward.function=null", "model.tensor_model_parallel_size=2"]
    message = refused(2, f"run_dir={tmp_path}/run", *target)
    assert message == "the reward Unloadable cannot be loaded: FileNotFoundError: no weights for rank 0"
    assert not (tmp_path / "run" / "failed_rollout.jsonl").exists()


EARLY = {
    "sizes": (["model.tensor_model_parallel_size=3"], "must divide the number of processes (2)"),
    "world size": (["trainer.devices=4"], "trainer.devices (4) x trainer.num_nodes (1) is 4"),
    "unknown key": (["+rollot.save=true"], "did you mean rollout"),
}
# What is looked for on every rank, which then agree on what they have found.
MISSING = {
    "file": (["data.train=/none.jsonl"], "data.train: cannot read /none.jsonl"),
    "reward": (["reward.function=nemo_brain.rewards.toy.none"], "has no 'none'"),
}


@pytest.fixture
def earlier(tmp_path):
    """An earlier run's file: it is not touched by a run that cannot start."""
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    yield file
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"] and file.read_text() == "{}\n"


@pytest.mark.parametrize("case", EARLY)
def test_a_mistake_in_the_configuration_stops_every_rank_before_they_meet(case, earlier):
    overrides, part = EARLY[case]
    results = run_ranks(failing, 2, f"run_dir={earlier.parent}", *overrides)
    assert all(part in message and not met for message, _, met in results), results


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_stops_every_rank_before_anything_is_written(case, earlier):
    overrides, part = MISSING[case]
    assert part in refused(2, f"run_dir={earlier.parent}", *overrides)


def test_a_bad_line_is_named_by_file_and_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n{"prompt": three}\n')
    message = refused(2, f"run_dir={tmp_path}/run", f"data.train={file}")
    assert message.startswith(f"{file}:4: invalid JSON") and "write one JSON object per line" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def damaged(tmp_path) -> list[str]:
    """Overrides that name a model whose embedding of "~" is NaN."""
    return [f"model.restore_from={damaged_llama(tmp_path / 'model')}", "model.gpt=null"]


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "virtual pipeline", "data"])
def test_weights_that_are_not_finite_are_refused_on_every_rank(layout, damaged, tmp_path):
    """With pipeline parallelism the second rank does not read the tensor."""
    kind = layout.split()[-1]
    split = [f"model.{kind}_model_parallel_size=2"] if kind != "data" else []
    split += ["model.virtual_pipeline_model_parallel_size=2"] if layout == "virtual pipeline" else []
    message = refused(2, f"run_dir={tmp_path}/run", *damaged, *split)
    file = f"{tmp_path}/model/model.safetensors"
    assert f"{file}: model.embed_tokens.weight is not finite: 1 of 4128 values are NaN or infinite" in message
    assert "model.allow_nonfinite=true" in message
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_logits_that_are_not_finite_end_every_replica_with_the_prompts_id(damaged, tmp_path):
    """One replica's prompt has them; what was sampled is kept."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": name, "prompt": f"say {name}"}) + "\n" for name in "abc~"))
    options = ["model.allow_nonfinite=true", "rollout.max_new_tokens=1", f"data.train={file}"]
    message = refused(2, f"run_dir={tmp_path}/run", *damaged, *options)
    assert message.startswith("the model's logits are not finite (NaN, or infinite) after 0 tokens of output 0 to the ")
    assert "prompt '~'" in message
    path = tmp_path / "run" / "failed_rollout.jsonl"
    assert message.endswith(f"groups sampled in this iteration are in {path})")
    kept = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert {"a", "b", "c"} >= set(kept) and len(kept) >= 2
