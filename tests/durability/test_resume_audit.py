"""Every key that a resumed run may change is changed: what follows is what the undisturbed run did.

Many at a time, because a run that differs in none of them differs in no part of them.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import epoch_runs
import pytest
import resumed_runs
import small_runs
from ranks import run_ranks
from resumed_runs import compare_record, records

from nemo_brain.config.brain import Config
from nemo_brain.config.reward_model import RewardConfig
from nemo_brain.config.schema import Never, keys, resume_rule
from nemo_brain.config.sft import SFTConfig
from nemo_brain.durability import checkpoint
from nemo_brain.durability.resume import flatten

KINDS = {"brain": Config, "sft": SFTConfig, "reward_model": RewardConfig}
each_kind = pytest.mark.parametrize("kind", KINDS)
# The checkpoint's run, stopped in the middle of an iteration, or of an epoch.
STOPPED = 3
RUN = {
    "brain": ["trainer.max_iterations=2", "optim.sched=null", "model.peft={dim: 4, alpha: 8}"],
    "sft": ["trainer.epochs=2", "optim.sched=null"],
    "reward_model": ["trainer.epochs=2", "optim.sched=null"],
}
# Values that leave every bit as it is, {...} is a new directory.
SAME: dict[str, Any] = {
    "run_dir": "{}/run",
    "trainer.accelerator": "cpu",
    "trainer.stop_after_minutes": 1000,
    "trainer.hang_timeout_minutes": 77,
    "trainer.log_every_steps": 2,
    "trainer.max_iterations": 3,
    "trainer.epochs": 3,
    "trainer.val_every_iterations": 1,
    "model.export_to": "{}/exported",
    "model.export_adapter_to": "{}/adapter",
    "model.allow_nonfinite": "true",
    "train.on_nonfinite": "skip",
    "train.min_ess": 3.0,
    "train.max_kl": 1e6,
    "rollout.max_proposal_gap": 0.5,
    "rollout.save": "false",
    "rollout.engine": "own",
    "rollout.colocated_memory": 0.3,
    "rollout.colocated_options.enforce_eager": "true",
    "ddp.overlap_grad_reduce": "false",
    "ddp.bucket_size": 1000,
    "ddp.gradient_reduce_div_fusion": "false",
    "ddp.average_in_collective": "true",
    "checkpoint.resume": "",
    "checkpoint.every_steps": 2,
    "checkpoint.every_minutes": 0.001,
    "checkpoint.at_end": "false",
    "checkpoint.async_save": "true",
    "checkpoint.keep_last": 5,
    "checkpoint.keep_best": 1,
    "checkpoint.allow_changes": "[seed]",
    "logger.tensorboard": "true",
}
# Values with which sums are taken in another order: fp32, 1e-5 as between layouts.
CLOSE: dict[str, Any] = {
    "model.recompute": "full",
    "model.options.recompute_num_layers": 2,
    "train.micro_batch_tokens": 64,
    "train.layout": "separate_rows",
    "rollout.rows_in_flight": 5,
    "prior.placement": "adapter_off",
}
# Keys that one process on this machine cannot try.
_LAYOUTS = "ranks: test_a_run_goes_on_in_another_layout, test_a_training_goes_on_in_another_layout"
ELSEWHERE = {
    "trainer.devices": _LAYOUTS,
    "trainer.num_nodes": "ranks: test_a_node_that_is_lost_and_comes_back_changes_nothing",
    "model.tensor_model_parallel_size": _LAYOUTS,
    "model.pipeline_model_parallel_size": _LAYOUTS,
    "model.virtual_pipeline_model_parallel_size": _LAYOUTS,
    "model.sequence_parallel": "needs tensor parallelism: test_parity.py",
    "model.push_to": "needs a hub, and is looked at after training: tests/training/test_push.py",
    "logger.wandb": "is given what TensorBoard is: tests/training/test_loggers.py",
    "logger.mlflow": "is given what TensorBoard is: tests/training/test_loggers.py",
    "rollout.ahead": "needs a server: tests/training/test_ahead.py",
    "rollout.remote": "a server's draws are its own: no two runs with one are alike, resumed or not",
}


def train(kind: str, run_dir: str, *overrides: str) -> str:
    if kind == "brain":
        return resumed_runs.train(run_dir, *RUN[kind], *overrides)
    return epoch_runs.train(kind, run_dir, *RUN[kind], *overrides)


def changed(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are of keys of this kind."""
    return {name: value for name, value in values.items() if resume_rule(KINDS[kind], name) is not False}


@each_kind
def test_every_key_that_may_change_is_tried_or_says_why_not(kind):
    rules = {name: resume_rule(KINDS[kind], name) for name, _, section in keys(KINDS[kind]) if section is None}
    free = {name for name, rule in rules.items() if rule and not isinstance(rule, Never)}
    tried = [f"{name}." for name in (*SAME, *CLOSE, *ELSEWHERE)]
    # A section that holds anything is tried by some of what it may hold.
    assert [n for n in free if not any(f"{n}.".startswith(name) or name.startswith(f"{n}.") for name in tried)] == []


@functools.cache
def undisturbed(kind: str) -> tuple[tempfile.TemporaryDirectory, list[dict]]:
    """A run's directory, with the checkpoint of step ``STOPPED``, and its records."""
    scratch = tempfile.TemporaryDirectory()
    run_ranks(train, 1, kind, f"{scratch.name}/run", f"checkpoint.every_steps={STOPPED}", "checkpoint.keep_last=9")
    return scratch, records(Path(scratch.name, "run"))


def going_on(kind: str, values: dict[str, Any], scratch: Path) -> list[dict]:
    """The records of the run that goes on from there with these values; all of them are other ones."""
    start = Path(undisturbed(kind)[0].name, "run/checkpoints", checkpoint.name_of(STOPPED))
    values = {"run_dir": "{}/run", **changed(kind, values), "checkpoint.resume": start}
    overrides = [f"++{name}={str(value).format(scratch)}" for name, value in values.items()]
    run_ranks(train, 1, kind, str(scratch / "run"), *overrides)
    (newest, *_) = checkpoint.complete(scratch / "run" / "checkpoints")
    before, after = (flatten(checkpoint.read_json(at / "run.json")["configuration"]) for at in (start, newest))
    assert [name for name in values if before.get(name) == after.get(name)] == []
    return records(scratch / "run")


@each_kind
@pytest.mark.parametrize(("values", "tolerance"), [(SAME, 0.0), (CLOSE, 1e-5)], ids=["to the bit", "but for rounding"])
def test_keys_that_may_change_change_nothing_that_is_computed(tmp_path, kind, values, tolerance):
    _, expected = undisturbed(kind)
    found = {(record["kind"], record["step"]): record for record in going_on(kind, values, tmp_path)}
    compared = [record for record in expected if record["step"] > STOPPED]
    assert len(compared) > 4
    for theirs in compared:
        compare_record(found[theirs["kind"], theirs["step"]], theirs, tolerance)


def test_a_run_that_is_made_longer_has_the_learning_rates_of_its_new_length(tmp_path):
    """From there on those of a run that had it from the start; what is recorded is what the optimizer had."""
    options = (
        "data.holdout=0",
        "optim.sched={name: CosineAnnealing, warmup_steps: 1, constant_steps: 0, min_lr: 1e-4}",
    )
    first = small_runs.train(tmp_path / "run", *options, "trainer.max_iterations=3")
    longer = (*options, "trainer.max_iterations=6")
    allowed = "checkpoint.allow_changes=[trainer.max_iterations]"
    then = small_runs.train(tmp_path / "run", *longer, allowed)
    whole = small_runs.train(tmp_path / "whole", *longer)
    assert then == whole[3:] and first != whole[:3]
    assert [record["lr"] for record in small_runs.records(tmp_path / "run", "step")] == first + then
