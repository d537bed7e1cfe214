"""Whole runs of conf/toy.yaml on one process: what they leave behind, and what must hold of their numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from small_runs import NO_VALIDATION, records, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import ROOT

from nemo_brain.config.brain import check
from nemo_brain.report.metrics import read_metrics, read_samples

SEED = {"kind", "step", "iteration"}
# docs: these names are stable.
STEP = SEED | {"loss", "kl_alpha_beta", "ess_alpha", "ess_beta", "max_alpha", "grad_norm", "lr", "tokens"}
STEP |= {"step_seconds", "tokens_per_second"}
ITERATION = SEED | {"reward/mean", "reward/std", "reward/best_of_n", "kl_to_prior", "proposal_gap", "outputs/length"}
ITERATION |= {"outputs/ended_fraction", "groups/zero_gradient", "sample_seconds", "score_seconds", "train_seconds"}
ITERATION |= {"peak_memory_gib", "reward/nonfinite", "prompts/truncated_fraction"}
TIMINGS = ("_seconds", "tokens_per_second", "peak_memory_gib")

REWARDS = """
def constant(prompts, outputs, *, references, metadata):
    return [0.5] * len(outputs)

def never(prompts, outputs, *, references, metadata):
    raise AssertionError("the rewards are in the file")
"""


def without_timings(run_dir: Path) -> list[dict]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.endswith(TIMINGS)} for line in lines]


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Path:
    """The directory of two runs, one after the other, of the same configuration."""
    run_dir = tmp_path_factory.mktemp("twice") / "run"
    for _ in range(2):
        train(run_dir, "logger.tensorboard=true")
    return run_dir


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(REWARDS)
    return lambda name: f"reward.function={file}:{name}"


def test_a_run_leaves_its_files(twice):
    config = OmegaConf.load(twice / "config.yaml")
    assert check(config).rollout.prompts_per_iteration == 8  # resolved, and a valid configuration by itself
    assert config.optim.lr == 3e-3
    kinds = [(r["kind"], r["step"], r["iteration"]) for r in read_metrics(twice / "metrics.jsonl")]
    steps = [("step", 1, 0), ("iteration", 1, 0), ("step", 2, 1), ("iteration", 2, 1)]
    assert kinds == [("eval", 0, 0), *steps, ("eval", 2, 2)]
    samples = read_samples(twice / "samples.jsonl")
    assert [s["kind"] for s in samples] == ["start"] * 16 + ["train"] * 16 + ["final"] * 16
    assert all(sum(o["weight"] for o in s["outputs"]) == pytest.approx(1) for s in samples if s["kind"] == "train")
    assert "<html" in (twice / "report.html").read_text()
    assert not (twice / "rollouts.jsonl").exists()


def test_the_metrics_have_exactly_the_stable_names(twice):
    assert all(set(record) == STEP for record in records(twice, "step"))
    assert all(set(record) == ITERATION for record in records(twice, "iteration"))
    for record in records(twice, "eval"):
        assert {"eval/reward", "eval/win_rate"} <= record.keys()
        assert all(name.startswith("eval/") for name in record.keys() - SEED)
    numbers = [r[n] for r in records(twice, "step") + records(twice, "iteration") for n in r.keys() - {"kind"}]
    assert all(math.isfinite(number) for number in numbers)


def test_tensorboard_has_the_same_numbers(twice):
    events = EventAccumulator(str(twice / "tensorboard"))
    events.Reload()
    for kind, name in (("step", "loss"), ("iteration", "reward/mean"), ("eval", "eval/reward")):
        expected = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records(twice, kind)]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_an_earlier_run_moves_aside_and_a_run_repeats_itself_bit_for_bit(twice, tmp_path):
    earlier = twice / "previous" / "1"
    names = {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "tensorboard",
        "checkpoints",
        "status.json",
    }
    assert {path.name for path in earlier.iterdir()} == names | {"status.json"}
    assert without_timings(earlier) == without_timings(twice)
    assert (earlier / "samples.jsonl").read_bytes() == (twice / "samples.jsonl").read_bytes()
    train(tmp_path, "seed=1")
    assert without_timings(tmp_path) != without_timings(twice)


def test_training_on_saved_rollouts_repeats_the_first_step(tmp_path, rewards):
    """The file holds rewards and log q', and the start model is the same, so the only step has the same loss and
    gradient. The groups come in another order, so sums differ by rounding."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, "rollout.save=true", "trainer.max_iterations=1", NO_VALIDATION)
    rollouts = f"data.rollouts={first}/rollouts.jsonl"
    train(second, rollouts, "data.train=null", "trainer.max_iterations=1", NO_VALIDATION, rewards("never"))
    lines = [json.loads(line) for line in (first / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(len(line["outputs"]) == 2 for line in lines)
    (expected,), (actual,) = records(first, "step"), records(second, "step")
    assert expected["loss"] > 0.01
    for name in ("loss", "kl_alpha_beta", "ess_alpha", "ess_beta", "max_alpha", "grad_norm"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
    assert actual["tokens"] == expected["tokens"]


def test_dpo_starts_at_log_2_for_every_pair_with_a_winner(tmp_path):
    """With q = p both outputs weigh 1/2: the loss is log 2, and zero for a tie, whose target is 1/2 each too."""
    train(tmp_path, "objective.name=dpo_sft", "objective.beta=0.1", NO_VALIDATION)
    samples = [s for s in read_samples(tmp_path / "samples.jsonl") if s["iteration"] == 0]
    pairs = [[output["reward"] for output in sample["outputs"]] for sample in samples]
    winners = sum(one != other for one, other in pairs)
    assert len(pairs) == 8 and winners >= 1
    assert records(tmp_path, "step")[0]["loss"] == pytest.approx(winners / 8 * math.log(2), abs=1e-4)


@pytest.fixture(scope="module")
def constant_reward(tmp_path_factory, rewards) -> Path:
    run_dir = tmp_path_factory.mktemp("constant")
    train(run_dir, rewards("constant"), NO_VALIDATION, "trainer.max_iterations=1")
    return run_dir


def test_groups_of_equal_rewards_teach_nothing_at_the_start(constant_reward):
    """Where q = p, up to rounding; other rewards give a gradient norm of about 4."""
    (step,) = records(constant_reward, "step")
    assert step["loss"] < 1e-10 and step["grad_norm"] < 1e-4


def test_groups_of_equal_rewards_are_counted(constant_reward):
    assert [record["groups/zero_gradient"] for record in records(constant_reward, "iteration")] == [8]


def test_groups_with_fewer_than_two_outputs_left_are_counted(tmp_path):
    train(tmp_path, "rollout.truncated=mask", "rollout.save=true", NO_VALIDATION)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    short = [sum(output["ended"] for output in line["outputs"]) < 2 for line in lines]
    counted = [record["groups/zero_gradient"] for record in records(tmp_path, "iteration")]
    assert counted == [sum(short[:8]), sum(short[8:])] and counted[0] > 0


def test_more_prompts_per_iteration_than_prompts(tmp_path):
    """Each is visited several times with draws of its own; without held-out prompts there is no validation."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": name, "prompt": f"{name}:"}) + "\n" for name in "abc"))
    train(tmp_path / "run", f"data.train={file}", NO_VALIDATION, "trainer.max_iterations=1")
    samples = read_samples(tmp_path / "run" / "samples.jsonl")
    assert {s["kind"] for s in samples} == {"train"} and records(tmp_path / "run", "eval") == []
    ids = [s["id"] for s in samples]
    assert len(set(ids)) == 8 and sorted(name.split("#")[0] for name in ids).count("a") in (2, 3)
    texts = {s["id"]: [output["text"] for output in s["outputs"]] for s in samples}
    assert texts["a"] != texts["a#2"]


def test_bf16_trains_on_the_same_gradient_to_its_precision(tmp_path):
    """On offline groups, which do not depend on the precision."""
    offline = ["data.train=null", f"data.rollouts={ROOT}/examples/data/rollouts.jsonl", "trainer.max_iterations=3"]
    batch = ["rollout.prompts_per_iteration=4", "train.global_batch_size=4", NO_VALIDATION]
    for precision in ("32", "bf16-mixed"):
        train(tmp_path / precision, *offline, *batch, f"trainer.precision='{precision}'")
    full, half = (records(tmp_path / precision, "step") for precision in ("32", "bf16-mixed"))
    for ours, theirs in zip(half, full, strict=True):
        # bf16 has 8 bits; a step moves the loss by far more.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    assert half[0]["grad_norm"] != full[0]["grad_norm"]
    assert half[-1]["loss"] < 0.9 * half[0]["loss"]


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory) -> tuple[list[float], list[float]]:
    """The learning rates used and those in metrics.jsonl, for 5 steps with 2 of warm-up."""
    run_dir = tmp_path_factory.mktemp("scheduled")
    sched = "optim.sched={name: CosineAnnealing, warmup_steps: 2, constant_steps: 0, min_lr: 1.0e-6}"
    used = train(run_dir, sched, "trainer.max_iterations=6", NO_VALIDATION)
    return used, [record["lr"] for record in records(run_dir, "step")]


def test_the_scheduler_sets_the_learning_rate(scheduled):
    """NeMo's warm-up from lr / 3 to lr, then half a cosine that ends at min_lr after the run's last step."""
    used, _ = scheduled
    cosine = [1e-6 + (3e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert used == pytest.approx([1e-3, 2e-3, *cosine])


def test_metrics_have_the_learning_rate_that_was_used(scheduled):
    used, recorded = scheduled
    assert recorded == pytest.approx(used)
