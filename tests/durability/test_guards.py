"""Gradients that are not finite never reach the weights; collapsed weights and drifting policies are noticed."""

from __future__ import annotations

import json
import logging
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from ranks import run_ranks
from toy_runs import toy_config

from nemo_brain.durability.checkpoint import complete
from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.run import run

RUN = (
    "trainer.max_iterations=2",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=4",
    "train.epochs_per_iteration=1",
    "data.holdout=0",
)
TP2 = "model.tensor_model_parallel_size=2"
DISTRIBUTED = "optim.use_distributed_optimizer=true"


class _Spoil(pl.Callback):
    """One rank's gradient becomes infinite in the second step; the weights and Adam's states before and after it."""

    def __init__(self):
        self.seen = []

    def _state(self, trainer) -> torch.Tensor:
        weights = [p.detach().flatten().float() for chunk in trainer.strategy.chunks for p in chunk.parameters()]
        for optimizer in trainer.strategy.optimizers:
            for inner in optimizer.mcore_optimizer.chained_optimizers:
                weights += [v.flatten().float() for state in inner.optimizer.state.values() for v in state.values()]
        return torch.cat(weights)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step == 1:
            self.seen.append(self._state(trainer))
            if trainer.global_rank == trainer.world_size - 1:
                for chunk in trainer.strategy.chunks:
                    for buffer in chunk.buffers:
                        buffer.grad_data.fill_(math.inf)

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 2:
            self.seen.append(self._state(trainer))


def _spoiled(run_dir: str, *overrides: str) -> bool:
    logging.disable(logging.WARNING)
    spoil = _Spoil()
    run(toy_config(f"run_dir={run_dir}", *RUN, *overrides), callbacks=[spoil])
    before, after = spoil.seen
    return torch.equal(before, after)


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(1, []), (2, [TP2]), (2, [DISTRIBUTED])], ids=["one process", "TP2", "DP2 distributed"]
)
def test_a_step_without_a_finite_gradient_is_left_out(tmp_path, ranks, overrides):
    """On every rank, though one alone had the infinite gradient; its groups are kept for a look."""
    assert run_ranks(_spoiled, ranks, str(tmp_path), "train.on_nonfinite=skip", *overrides) == [True] * ranks
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["grad_norm"] is None for record in steps] == [False, True, False, False]
    groups = [json.loads(line) for line in (tmp_path / "nonfinite_step_2.jsonl").read_text().splitlines()]
    assert len(groups) == 4 and all(len(group["outputs"]) == 4 for group in groups)


def test_such_a_step_stops_the_run_by_default(tmp_path):
    with pytest.raises(AssertionError, match=r"ValueError: the gradient of step 2 is not finite.*on_nonfinite=skip"):
        run_ranks(_spoiled, 2, str(tmp_path), TP2)
    assert (tmp_path / "nonfinite_step_2.jsonl").exists()


def _warned(run_dir: str, *overrides: str) -> list[str]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(toy_config(f"run_dir={run_dir}", *RUN, *overrides))
    return [str(warning.message) for warning in caught]


def test_collapsed_weights_are_warned_of(tmp_path):
    (said,) = run_ranks(_warned, 1, str(tmp_path / "a"), "objective.gamma=1e-4", "train.min_ess=3.5")
    assert any("raise objective.gamma or rollout.outputs_per_prompt" in message for message in said)
    (said,) = run_ranks(_warned, 1, str(tmp_path / "b"), "objective.gamma=10", "train.min_ess=3.5")
    assert not any("objective.gamma" in message for message in said)


def test_a_run_that_drifts_too_far_saves_and_stops(tmp_path):
    options = ["optim.lr=3e-2", "trainer.max_iterations=9", "train.max_kl=0.5", "checkpoint.every_minutes=null"]
    (said,) = run_ranks(_warned, 1, str(tmp_path), *options)
    assert any("above train.max_kl=0.5" in message for message in said)
    iterations = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "iteration"]
    assert len(iterations) < 9
    assert [record["kl_to_prior"] > 0.5 for record in iterations] == [False] * (len(iterations) - 1) + [True]
    assert [path.name for path in complete(tmp_path / "checkpoints")] == [f"step_{2 * len(iterations):09d}"]


REWARDS = """
import math, os

def spoiled(prompts, outputs, *, references, metadata):
    return [math.nan if i % 8 == 0 else math.inf if i % 4 == 0 else float(len(o)) for i, o in enumerate(outputs)]

class Collective:
    collective = True

    def setup(self, strategy):
        pass

    def score(self, groups, alone):
        texts = [output.text for group in groups for output in group.outputs]
        rewards = iter(spoiled(texts, texts, references=texts, metadata=texts))
        return [[next(rewards) for output in group.outputs] for group in groups]

def never(prompts, outputs, *, references, metadata):
    raise AssertionError("the rewards are in the file")
"""
ONE_STEP = ("trainer.max_iterations=1", "train.global_batch_size=8", "rollout.save=true")
SKIP = "train.on_nonfinite=skip"


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module whose rewards are NaN or infinite for the first output of each group of four."""
    (tmp_path / "spoiled_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return {
        "function": ["reward.function=spoiled_rewards.spoiled"],
        "collective": ["reward._target_=spoiled_rewards.Collective", "reward.function=null"],
        "never": ["reward.function=spoiled_rewards.never"],
    }


def _records(run_dir, kind: str) -> list[dict]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind]


@pytest.mark.parametrize(
    ("ranks", "kind", "overrides"),
    [(2, "function", []), (2, "collective", [TP2]), (2, "collective", [])],
    ids=["DP2", "TP2, collective", "DP2, collective"],
)
def test_outputs_without_a_finite_reward_are_left_out_of_the_step(tmp_path, rewards, ranks, kind, overrides):
    """The step is that of groups that never had them, which the rollout file holds."""
    first, second = tmp_path / "first", tmp_path / "second"
    said = run_ranks(_warned, ranks, str(first), *ONE_STEP, SKIP, *rewards[kind], *overrides)
    message = f"iteration 0: outputs of 8 groups have no finite reward and are left out; their groups are in {first}"
    assert any(warning.startswith(message) for warning in said[0])
    (iteration,), (step,) = _records(first, "iteration"), _records(first, "step")
    assert iteration["reward/nonfinite"] == 8 and math.isfinite(iteration["reward/mean"])
    spoiled = [json.loads(line) for line in (first / "nonfinite_rewards_0.jsonl").read_text().splitlines()]
    assert len(spoiled) == 8
    for group in spoiled:
        assert [math.isfinite(reward) for reward in group["rewards"]] == [False, True, True, True]
        assert len(group["outputs"]) == 4
    for sample in map(json.loads, (first / "samples.jsonl").read_text().splitlines()):
        assert (sample["outputs"][0]["reward"], sample["outputs"][0]["weight"]) == (None, 0.0)
        assert sum(output["weight"] for output in sample["outputs"]) == pytest.approx(1.0)
    offline = [f"data.rollouts={first}/rollouts.jsonl", "data.train=null"]
    run_ranks(_warned, 1, str(second), *ONE_STEP, *rewards["never"], *offline)
    (expected,) = _records(second, "step")
    assert expected["loss"] > 0.01
    for name in ("loss", "kl_alpha_beta", "ess_alpha", "ess_beta", "max_alpha", "grad_norm"):
        # The groups come in another order, in another layout: float32 sums.
        assert step[name] == pytest.approx(expected[name], rel=1e-5), name


def test_held_out_outputs_without_a_finite_reward_are_left_out_of_the_means(tmp_path, rewards):
    run_ranks(_warned, 2, str(tmp_path / "run"), *ONE_STEP, "data.holdout=8", SKIP, *rewards["function"])
    for record in _records(tmp_path / "run", "eval"):
        # The first output of each replica's call, one per prompt.
        assert record["eval/nonfinite"] == 2 and 4 <= record["eval/prompts"] <= 6
        assert math.isfinite(record["eval/reward"]) and math.isfinite(record["eval/win_rate"])


def test_such_a_reward_stops_the_run_by_default(tmp_path, rewards):
    with pytest.raises(AssertionError, match=r"spoiled_rewards.spoiled returned nan for output 0: .*on_nonfinite=skip"):
        run_ranks(_warned, 2, str(tmp_path / "run"), *ONE_STEP, *rewards["function"])
