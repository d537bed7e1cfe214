"""A run that was interrupted, killed or stopped anywhere and goes on is the run that was not.

Runs are forks of the test process (tests/ranks.py), so that each costs seconds; what kills them is SIGKILL.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from layouts import PP2, TP2, VIRTUAL, cases
from ranks import Ranks, run_ranks
from resumed_runs import STEPS, compare, failure, records, train, undisturbed, written

from nemo_brain.durability import checkpoint
from nemo_brain.report.run_dir import read_status

DISTRIBUTED = "optim.use_distributed_optimizer=true"
ASYNC = "checkpoint.async_save=true"


SAME = {
    "one process": (1, []),
    "TP2": (2, [TP2]),
    "PP2": (2, [PP2]),
    "DP2 distributed optimizer": (2, [DISTRIBUTED]),
    # Saved at every step, while the next one trains: what is written is the state as it was.
    "DP2 distributed optimizer, async": (2, [DISTRIBUTED, ASYNC, "checkpoint.every_steps=1"]),
}


@pytest.mark.parametrize("name", cases(SAME, "TP2", "DP2 distributed optimizer, async"))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    """Told to stop in the middle of iterations and at the end of one; every number of the rest is the same."""
    ranks, overrides = SAME[name]
    expected, files = undisturbed(*(o for o in overrides if "checkpoint" not in o), ranks=ranks)
    # After steps 3, 4 (an iteration's last) and 8.
    for stop, by in ((3, signal.SIGTERM), (1, signal.SIGINT), (4, signal.SIGUSR1)):
        ends = run_ranks(train, ranks, str(tmp_path / "run"), *overrides, stop_after=stop, by=by)
        assert f"signal {by.name}" in ends[0] and "finished" not in ends
        assert read_status(tmp_path / "run")["state"] == "interrupted"
    assert run_ranks(train, ranks, str(tmp_path / "run"), *overrides) == ["finished"] * ranks
    compare(tmp_path / "run", expected, tolerance=0)
    assert written(tmp_path / "run") == files
    assert not list(tmp_path.glob("run/previous/*"))


def test_an_objectives_state_goes_on_with_the_run(tmp_path):
    """In the middle of an iteration; forgotten, the normaliser would start anew and give other gradients."""
    objective = ["objective={name: null, _target_: plug_ins.RunningDPG, gamma: 0.1, goodness: null}"]
    expected, files = undisturbed(*objective)
    for stop in (3, 2):
        run_ranks(train, 1, str(tmp_path / "run"), *objective, stop_after=stop)
    (newest, *_) = checkpoint.complete(tmp_path / "run" / "checkpoints")
    assert checkpoint.read_json(newest / "state.json")["state"]["objective"]
    run_ranks(train, 1, str(tmp_path / "run"), *objective)
    compare(tmp_path / "run", expected, tolerance=0)
    assert written(tmp_path / "run") == files


FOUR = ["model.gpt.num_layers=4"]  # one for each virtual stage
OTHER = {
    "one process to TP2": (1, [], 2, [TP2]),
    "TP2 to PP2 with 2 virtual stages": (2, [TP2, *FOUR], 2, [PP2, VIRTUAL, *FOUR]),
    "PP2 to one process, prior offloaded": (2, [PP2], 1, ["prior.placement=offload"]),
    "DP2 to one process, both with the distributed optimizer": (2, [DISTRIBUTED], 1, [DISTRIBUTED]),
    "one process to TP2 x PP2, two pass": (1, [], 4, [TP2, PP2, "train.micro_batch_tokens=1"]),
    "TP2 x DP2 to DP2, distributed optimizer": (4, [TP2, DISTRIBUTED], 2, [DISTRIBUTED]),
}


@pytest.mark.parametrize("name", cases(OTHER, "TP2 to PP2 with 2 virtual stages"))
def test_a_run_goes_on_in_another_layout(tmp_path, name):
    """In the middle of an iteration. fp32, sums in another order."""
    ranks, overrides, other_ranks, other_overrides = OTHER[name]
    run_ranks(train, ranks, str(tmp_path / "run"), *overrides, stop_after=7)
    run_ranks(train, other_ranks, str(tmp_path / "run"), *other_overrides)
    layers = [override for override in overrides if override in FOUR]
    compare(tmp_path / "run", undisturbed(*layers)[0], tolerance=1e-5)


KILLED = {"one process": (1, [], 11), "PP2": (2, [PP2], 7), "PP2, async": (2, [PP2, ASYNC], 5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(KILLED, "PP2"))
def test_kill_9_anywhere_costs_at_most_the_work_since_the_last_checkpoint(tmp_path, name):
    """SIGKILL for one rank or all, at random moments of sampling, scoring, training and saving."""
    ranks, overrides, points = KILLED[name]
    expected, files = undisturbed(*(o for o in overrides if "checkpoint" not in o), ranks=ranks)
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    options = (str(run_dir), "checkpoint.every_steps=1", *overrides)
    kills = 0
    while kills < points:
        running = Ranks(train, ranks, *options)
        running.kill_after(draw.uniform(0.2, 2.5), draw.choice([[0], list(range(ranks))]))
        kills += running.wait() == "killed"
        for found in checkpoint.complete(run_dir / "checkpoints"):
            assert checkpoint.damage(found, 0, 1) is None, "what is visible is complete"
        if (run_dir / "status.json").exists() and json.loads((run_dir / "status.json").read_text())[
            "state"
        ] == "finished":
            compare(run_dir, expected, tolerance=0)
            shutil.rmtree(run_dir)
    assert run_ranks(train, ranks, *options) == ["finished"] * ranks
    compare(run_dir, expected, tolerance=0)
    assert written(run_dir) == files
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run directory with checkpoints of steps 2, 3 (newest) in the middle of an iteration."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    run_ranks(train, 1, str(run_dir), "checkpoint.every_steps=1", stop_after=3)
    assert [path.name for path in checkpoint.complete(run_dir / "checkpoints")] == ["step_000000003", "step_000000002"]
    return run_dir


@pytest.fixture
def copied(interrupted, tmp_path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def test_keys_that_change_the_mathematics_are_refused_unless_allowed(copied):
    said = failure(copied, "objective.gamma=0.2", "rollout.temperature=1.5")
    assert "objective.gamma: 0.1 -> 0.2" in said and "rollout.temperature: 1.0 -> 1.5" in said
    assert "checkpoint.allow_changes=[objective.gamma, rollout.temperature]" in said
    run_ranks(train, 1, str(copied), "objective.gamma=0.2", "checkpoint.allow_changes=[objective.gamma]")
    assert read_status(copied)["state"] == "finished"


def test_another_prior_is_refused(copied):
    assert "another start model, which is the prior" in failure(copied, "seed=1", "checkpoint.allow_changes=[seed]")


CODE = {"code in the index": ".metadata", "code in the common part": "common.pt"}


def plant(path: Path, name: str, content: bytes) -> None:
    """Puts a file into a checkpoint, with the checksum that belongs to it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = checkpoint.checksums(path, 0, 1)[name]
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", *CODE])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(copied, damage):
    newest, older = checkpoint.complete(copied / "checkpoints")
    weights = max((newest / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    else:
        trap = copied / "executed"
        code = f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()
        plant(newest, f"weights/{CODE[damage]}", code)
    problem = checkpoint.damage(newest, 0, 1)
    assert problem is not None and str(newest) in problem and checkpoint.damage(older, 0, 1) is None
    assert "no intact checkpoint" in failure(copied, f"checkpoint.resume={newest}")
    run_ranks(train, 1, str(copied))
    compare(copied, undisturbed()[0], tolerance=0)
    assert not (copied / "executed").exists()


def test_code_in_the_random_states_is_not_run(copied):
    newest, _ = checkpoint.complete(copied / "checkpoints")
    trap = copied / "executed"
    plant(newest, "random/00000.pt", f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    said = failure(copied)
    assert f"{newest}/random/00000.pt is damaged, or not data alone" in said
    assert not trap.exists()


def test_code_in_the_tensors_is_not_run(copied):
    newest, _ = checkpoint.complete(copied / "checkpoints")
    trap = copied / "executed"
    code = f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()
    entries = pickle.loads((newest / "weights" / ".metadata").read_bytes()).storage_data.values()
    for name in {entry.relative_path for entry in entries}:
        content = bytearray((newest / "weights" / name).read_bytes())
        for entry in entries:
            if entry.relative_path == name:
                assert entry.length >= len(code)
                content[entry.offset : entry.offset + len(code)] = code
        plant(newest, f"weights/{name}", bytes(content))
    assert "Weights only load failed" in failure(copied)
    assert not trap.exists()


def test_a_newer_format_is_named(copied):
    for path in checkpoint.complete(copied / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "is newer than this version's" in failure(copied)


def test_resume_never_and_elsewhere(copied, tmp_path):
    assert "is no checkpoint" in failure(tmp_path / "new", f"checkpoint.resume={tmp_path}/nothing")
    run_ranks(train, 1, str(tmp_path / "new"), f"checkpoint.resume={copied}")
    (final,) = [r for r in records(tmp_path / "new") if r["kind"] == "eval" and r["step"] == STEPS]
    assert final in undisturbed()[0]
    # A checkpoint of the run's own directory, by another path.
    shutil.copytree(copied, tmp_path / "again")
    run_ranks(train, 1, f"{tmp_path}/new/../again", f"checkpoint.resume={tmp_path}/again/checkpoints/step_000000003")
    compare(tmp_path / "again", undisturbed()[0], tolerance=0)
    assert not (tmp_path / "again" / "previous").exists()
    run_ranks(train, 1, str(copied), "checkpoint.resume=never")
    compare(copied, undisturbed()[0], tolerance=0)
    assert (copied / "previous" / "1" / "checkpoints" / "step_000000003").is_dir()


def test_a_checkpoint_that_is_removed_meanwhile_has_no_score(tmp_path):
    """With ``checkpoint.async_save`` a thread removes them while rank 0 looks for the best."""
    assert checkpoint.score_of(tmp_path / "step_000000001") is None


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first = Ranks(train, 1, str(tmp_path / "run"), "trainer.max_iterations=1000")
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
        assert "another run is writing there" in failure(tmp_path / "run")
    finally:
        first.kill_after(0, [0])
        assert first.wait() == "killed"


def _without_room(room: int, *args) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # fails where a full disk would
    return train(*args)


# In the middle of a tensor, and at the end of its archive.
@pytest.mark.parametrize(("room", "why"), [(60_000, "File too large"), (100_000, "unexpected pos")])
@pytest.mark.parametrize(("ranks", "background"), [(1, "false"), (2, "false"), (2, "true")])
def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoints(copied, ranks, background, room, why):
    options = [str(copied), "checkpoint.every_steps=1", f"checkpoint.async_save={background}"]
    with pytest.raises(AssertionError, match=rf"could not be written, earlier ones are unharmed: rank .*{why}"):
        run_ranks(_without_room, ranks, room, *options)
    assert [path.name for path in checkpoint.complete(copied / "checkpoints")] == ["step_000000003", "step_000000002"]


def _with_a_mistake(*args) -> str:
    def broken(path, content):
        raise TypeError("a mistake in the program")

    checkpoint.write_text = broken
    return train(*args)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_mistake_in_saving_is_shown_as_what_it_is_on_every_rank(tmp_path, background):
    """Not as a full disk; rank 1 writes no such file, and shows rank 0's traceback."""
    options = [str(tmp_path / "run"), "checkpoint.every_steps=1", f"checkpoint.async_save={background}"]
    with pytest.raises(AssertionError) as caught:
        run_ranks(_with_a_mistake, 2, *options)
    said = str(caught.value)
    assert "TypeError: a mistake in the program" in said and "could not be written" not in said
    assert "in broken" in said


def test_a_time_limit_stops_and_saves(tmp_path):
    (said,) = run_ranks(
        train, 1, str(tmp_path / "run"), "trainer.stop_after_minutes=0.002", "trainer.max_iterations=1000"
    )
    assert said == "trainer.stop_after_minutes=0.002"
    step = read_status(tmp_path / "run")["step"]
    # Before the first step there is nothing to go on with.
    saved = [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "run" / "checkpoints")]
    assert saved == ([step] if step else [])


def test_the_newest_and_the_best_are_kept(tmp_path):
    options = ["checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_best=2", "optim.lr=3e-2"]
    run_ranks(train, 1, str(tmp_path / "run"), *options, "trainer.val_every_iterations=1")
    kept = checkpoint.complete(tmp_path / "run" / "checkpoints")
    assert kept[0].name == f"step_{STEPS:09d}" and 1 <= len(kept) <= 3
    scores = [r["eval/reward"] for r in records(tmp_path / "run") if r["kind"] == "eval" and r["step"]]
    assert max(scores) in [checkpoint.read_json(path / "run.json")["score"] for path in kept]
