"""Which keys a resumed run may change, for every kind of training: it is said at the keys' fields."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from toy_runs import composed, toy_config

from nemo_brain.config.brain import check
from nemo_brain.config.common import TrainingConfig
from nemo_brain.config.reward_model import check_reward_config
from nemo_brain.config.sft import check_sft_config
from nemo_brain.durability.resume import check_configuration

KINDS = {
    "brain": (lambda *overrides: check(toy_config(*overrides)), "trainer.max_iterations"),
    "sft": (lambda *overrides: check_sft_config(composed("sft", "data.train=x", *overrides)), "trainer.epochs"),
    "reward_model": (
        lambda *overrides: check_reward_config(composed("reward_model", "data.train=x", *overrides)),
        "trainer.epochs",
    ),
}
SCHED = "optim.sched={name: CosineAnnealing, warmup_steps: 1}"
each_kind = pytest.mark.parametrize(("made", "length"), KINDS.values(), ids=KINDS)


def changes(path: Path, before: TrainingConfig, after: TrainingConfig) -> list[str]:
    (path / "run.json").write_text(json.dumps({"configuration": dataclasses.asdict(before)}))
    return check_configuration(after, path, dataclasses.asdict(after))


def refusal(path: Path, before: TrainingConfig, after: TrainingConfig) -> str:
    with pytest.raises(ValueError) as caught:
        changes(path, before, after)
    return str(caught.value)


@each_kind
def test_how_and_where_a_run_computes_may_change_and_is_listed(made, length, tmp_path):
    after = made(
        "run_dir=elsewhere",
        "train.micro_batch_tokens=77",
        "model.tensor_model_parallel_size=2",
        "+model.options.recompute_num_layers=2",
        "+ddp.bucket_size=7",
        "checkpoint.keep_last=9",
        "train.on_nonfinite=skip",
        f"{length}=77",
    )
    listed = changes(tmp_path, made(), after)
    assert sum("77" in line for line in listed) == 2 and 'train.on_nonfinite: "stop" -> "skip"' in listed
    # The empty section that the option was added to is a key of its own, before; an export may lie in the run_dir.
    assert len(listed) == 9 + (after.model.export_to is not None), listed


@each_kind
def test_what_a_run_computes_may_not_change_unless_allowed(made, length, tmp_path):
    other = ("seed=5", "optim.lr=0.5")
    said = refusal(tmp_path, made(), made(*other))
    assert "seed: 0 -> 5" in said and "checkpoint.allow_changes=[optim.lr, seed]" in said
    assert len(changes(tmp_path, made(), made(*other, "checkpoint.allow_changes=[seed, optim.*]"))) == 3


@each_kind
def test_the_length_may_not_change_under_a_learning_rate_schedule_unless_allowed(made, length, tmp_path):
    before, after = made(SCHED), made(SCHED, f"{length}=77")
    said = refusal(tmp_path, before, after)
    assert "-> 77 (with optim.sched the learning rates depend on the length: if allowed, " in said
    assert f"checkpoint.allow_changes=[{length}]" in said
    assert len(changes(tmp_path, before, made(SCHED, f"{length}=77", f"checkpoint.allow_changes=[{length}]"))) == 2


def test_adapters_in_place_of_weights_are_another_training(tmp_path):
    made, _ = KINDS["brain"]
    assert "model.peft.dim: null -> 4" in refusal(tmp_path, made(), made("model.peft={dim: 4}"))


@each_kind
def test_batches_may_not_change_even_if_allowed(made, length, tmp_path):
    """The step at which the run stands would be of another epoch or iteration."""
    values = {"train.global_batch_size": 2}
    if length == "trainer.max_iterations":
        values |= {"rollout.prompts_per_iteration": 48, "train.epochs_per_iteration": 3}
    for key, value in values.items():
        said = refusal(tmp_path, made(), made(f"{key}={value}", "checkpoint.allow_changes=['*']"))
        assert f"{key}: " in said and "counted in steps where the run stands" in said
        assert "allow them with" not in said


@each_kind
def test_what_an_option_says_of_the_model_or_its_precision_may_not_change(made, length, tmp_path):
    for option in ("model.options.rotary_base", "model.options.fp8_margin", "ddp.grad_reduce_in_fp32"):
        assert option in refusal(tmp_path, made(), made(f"++{option}=7"))
