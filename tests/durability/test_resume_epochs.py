"""Fine-tuning and reward-model training that were stopped or killed anywhere and go on are those that were not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from epoch_runs import KINDS, STEPS, train, undisturbed
from layouts import PP2, TP2
from ranks import Ranks, run_ranks
from resumed_runs import compare, written

from nemo_brain.durability import checkpoint
from nemo_brain.report.run_dir import read_status

DISTRIBUTED = "optim.use_distributed_optimizer=true"
LORA = "model.peft={name: lora, dim: 4, alpha: 8}"
SAME = {
    "one process": (1, []),
    "TP2": (2, [TP2]),
    "PP2, async": (2, [PP2, "checkpoint.async_save=true", "checkpoint.every_steps=1"]),
    "DP2 distributed optimizer": (2, [DISTRIBUTED]),
    "TP2, LoRA": (2, [TP2, LORA]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "overrides"), SAME.values(), ids=SAME)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind, ranks, overrides):
    """Told to stop in the middle of an epoch, at the end of one, and in the last; every number of the rest is the same,
    and so are the files."""
    expected, files = undisturbed(kind, *(o for o in overrides if "checkpoint" not in o), ranks=ranks)
    run_dir = tmp_path / "run"
    # After steps 2, 4 (an epoch's last) and 10.
    for stop, by in ((2, signal.SIGTERM), (2, signal.SIGINT), (6, signal.SIGUSR1)):
        ends = run_ranks(train, ranks, kind, str(run_dir), *overrides, stop_after=stop, by=by)
        assert f"signal {by.name}" in ends[0] and "finished" not in ends
        assert read_status(run_dir)["state"] == "interrupted"
    assert run_ranks(train, ranks, kind, str(run_dir), *overrides) == ["finished"] * ranks
    compare(run_dir, expected, tolerance=0)
    assert written(run_dir) == files
    assert read_status(run_dir) == {"state": "finished", "step": STEPS}
    assert (run_dir / "model" / "config.json").exists() and (run_dir / "report.html").exists()
    assert not list(run_dir.glob("previous/*"))


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(1, []), (2, [PP2]), (2, [DISTRIBUTED])], ids=["one process", "PP2", "DP2"]
)
def test_a_reward_model_with_frozen_layers_goes_on_bit_for_bit(tmp_path, ranks, overrides):
    """Of frozen layers the optimizer has no state; with PP2 the first stage trains nothing at all."""
    options = ["model.frozen_layers=1", *overrides]
    expected, files = undisturbed("reward_model", *options, ranks=ranks)
    run_ranks(train, ranks, "reward_model", str(tmp_path / "run"), *options, stop_after=6)
    assert run_ranks(train, ranks, "reward_model", str(tmp_path / "run"), *options) == ["finished"] * ranks
    compare(tmp_path / "run", expected, tolerance=0)
    assert written(tmp_path / "run") == files


OTHER = {
    "one process to TP2": (1, [], 2, [TP2]),
    "TP2 to PP2": (2, [TP2], 2, [PP2]),
    "DP2 to one process, distributed optimizer": (2, [DISTRIBUTED], 1, [DISTRIBUTED]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHER)
def test_a_training_goes_on_in_another_layout(tmp_path, kind, name):
    """In the middle of an epoch. fp32, sums in another order."""
    ranks, overrides, other_ranks, other_overrides = OTHER[name]
    run_ranks(train, ranks, kind, str(tmp_path / "run"), *overrides, stop_after=7)
    run_ranks(train, other_ranks, kind, str(tmp_path / "run"), *other_overrides)
    compare(tmp_path / "run", undisturbed(kind)[0], tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (2, [PP2])], ids=["one process", "PP2"])
def test_kill_9_anywhere_costs_at_most_the_work_since_the_last_checkpoint(tmp_path, kind, ranks, overrides):
    """SIGKILL for one rank or all, at random moments of training, evaluating, saving and exporting."""
    expected, files = undisturbed(kind, *overrides, ranks=ranks)
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    options = (kind, str(run_dir), "checkpoint.every_steps=1", *overrides)
    kills = 0
    while kills < 4:
        running = Ranks(train, ranks, *options)
        running.kill_after(draw.uniform(0.3, 2.5), draw.choice([[0], list(range(ranks))]))
        kills += running.wait() == "killed"
        for found in checkpoint.complete(run_dir / "checkpoints"):
            assert checkpoint.damage(found, 0, 1) is None, "what is visible is complete"
        if read_status(run_dir).get("state") == "finished":
            compare(run_dir, expected, tolerance=0)
            shutil.rmtree(run_dir)
    assert run_ranks(train, ranks, *options) == ["finished"] * ranks
    compare(run_dir, expected, tolerance=0)
    assert written(run_dir) == files


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_ended(tmp_path, kind):
    """Nothing is left to train, but the model has not been exported."""
    run_dir = tmp_path / "run"
    run_ranks(train, 1, kind, str(run_dir))
    exported = (run_dir / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "model")
    (run_dir / "status.json").write_text('{"state": "running", "step": 0}')
    assert run_ranks(train, 1, kind, str(run_dir)) == ["finished"]
    assert (run_dir / "model" / "model.safetensors").read_bytes() == exported
    assert read_status(run_dir) == {"state": "finished", "step": STEPS}


def failure(run_dir: Path, kind: str, *overrides: str) -> str:
    with pytest.raises(AssertionError) as caught:
        run_ranks(train, 1, kind, str(run_dir), *overrides)
    return str(caught.value)


def test_other_data_another_kind_and_other_keys_are_refused(tmp_path):
    run_dir = tmp_path / "run"
    run_ranks(train, 1, "sft", str(run_dir), stop_after=2)
    assert "is of another kind of training (sft)" in failure(run_dir, "reward_model")
    assert "on other data (examples: 28:" in failure(run_dir, "sft", "data.holdout=5")
    said = failure(run_dir, "sft", "optim.lr=1e-3")
    assert "optim.lr: 0.0003 -> 0.001" in said and "checkpoint.allow_changes=[optim.lr]" in said
