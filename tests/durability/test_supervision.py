"""One rank fails, or all of them hang: every rank ends, soon, and says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from ranks import free_port
from toy_runs import QUIET, ROOT, toy_config

from nemo_brain.config.brain import check
from nemo_brain.durability import supervision
from nemo_brain.training.brain.run import run

SMALL = ("rollout.prompts_per_iteration=8", "train.global_batch_size=8", "data.holdout=0", "trainer.max_iterations=3")
SECONDS = 60  # from the failure to the end of all ranks, on a busy machine; a collective would wait for half an hour


class Fails(pl.Callback):
    """After the first step rank 1 fails while the others go on, or, with ``stuck``, hang where nothing wakes them."""

    def __init__(self, stuck: bool):
        self.stuck = stuck

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if dist.get_rank() == 1:
            raise KeyError("the first cause")
        if self.stuck:
            threading.Event().wait()


class Hangs(pl.Callback):
    """After the first step rank 1 waits for what never comes, and the others for rank 1.

    stacks: instead, every rank waits until its stacks are shown there, and fails then, as what waits for a rank that
    has ended would.
    """

    def __init__(self, stacks: Path | None):
        self.stacks = stacks

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.stacks is not None:
            while not (self.stacks / f"rank_{dist.get_rank():05d}.txt").exists():
                time.sleep(0.01)
            raise RuntimeError("connection closed by peer")
        if dist.get_rank() == 1:
            a_lock_that_nobody_opens()


def a_lock_that_nobody_opens() -> None:
    threading.Event().wait()


def started(function, ranks: int, directory: Path, *args) -> list[tuple[int, float, str]]:
    """Exit code, seconds and stderr of each of the ranks, forks of this process. Nothing ends one but itself."""
    port, began, pids = free_port(), time.monotonic(), []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(os.open(directory / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), 2)
                sys.stderr = sys.__stderr__  # pytest's goes elsewhere
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                where |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in where.items()})
                function(*args)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    ends: list = [None] * ranks
    while None in ends:
        for rank, pid in enumerate(pids):
            if ends[rank] is None and os.waitpid(pid, os.WNOHANG)[0]:
                ends[rank] = time.monotonic() - began
        if time.monotonic() - began > 5 * SECONDS:
            for rank, pid in enumerate(pids):
                if ends[rank] is None:
                    os.kill(pid, 9)
            pytest.fail(f"not all ranks have ended: {ends}")
        time.sleep(0.05)
    return [(seconds, (directory / f"{rank}.stderr").read_text()) for rank, seconds in enumerate(ends)]


def fails(run_dir: str, stuck: bool, *overrides: str) -> None:
    run(toy_config(f"run_dir={run_dir}", *SMALL, *overrides), callbacks=[Fails(stuck)])


def hangs(run_dir: Path, fails: bool, unread: bool = False) -> None:
    if unread:  # what it prints: as after the end of a launcher
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(reading)
    overrides = (f"run_dir={run_dir}", *SMALL, "trainer.hang_timeout_minutes=0.1")
    run(toy_config(*overrides), callbacks=[Hangs(run_dir / "stacks" if fails else None)])


WAITS = {
    "in a collective": (False, []),
    "in the pipeline": (False, ["model.pipeline_model_parallel_size=2"]),
    "in something that nothing wakes": (True, ["model.tensor_model_parallel_size=2"]),
}


@pytest.mark.parametrize("where", WAITS)
def test_the_first_failure_ends_the_ranks_that_wait(where, tmp_path):
    stuck, overrides = WAITS[where]
    (first_end, first), (second_end, second) = started(fails, 2, tmp_path, str(tmp_path / "run"), stuck, *overrides)
    # The rank that failed ends before the other: launchers take it for the cause.
    assert second_end < first_end < second_end + SECONDS
    assert second.rstrip().endswith("KeyError: 'the first cause'")
    # The other one's last words are the first one's traceback, whatever it has said of its own troubles.
    *_, last = first.split("[rank 0] ")
    assert last.startswith("rank 1 has failed, which ends this one: \nTraceback (most recent call last)")
    assert last.rstrip().endswith("KeyError: 'the first cause'")


HANG = r"no rank has got any further for 0.1 minutes \(trainer.hang_timeout_minutes\).* in .*/run/stacks"


def test_a_run_that_hangs_prints_every_ranks_stacks_and_ends(tmp_path):
    run_dir = tmp_path / "run"
    ends = started(hangs, 2, tmp_path, run_dir, False)
    for rank, (seconds, said) in enumerate(ends):
        assert seconds < 2 * SECONDS
        assert f"[rank {rank}] stacks:" in said
        assert re.search(HANG, said.splitlines()[-1])
        assert (run_dir / "stacks" / f"rank_{rank:05d}.txt").read_text() in said
    assert "a_lock_that_nobody_opens" in ends[1][1] and "a_lock_that_nobody_opens" not in ends[0][1]
    assert "distributed_c10d.py" in ends[0][1], "it waits in a collective"


def test_a_run_that_hangs_ends_though_nobody_reads_what_it_prints(tmp_path):
    for seconds, said in started(hangs, 2, tmp_path, tmp_path / "run", False, True):
        assert seconds < 2 * SECONDS and "stacks" not in said
    assert len(list((tmp_path / "run" / "stacks").iterdir())) == 2


def test_what_a_hang_makes_fail_is_not_taken_for_the_cause(tmp_path):
    for _, said in started(hangs, 2, tmp_path, tmp_path / "run", True):
        assert re.search(HANG, said.splitlines()[-1])


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests", {here!r}]
from nemo_brain.host import cpu
cpu.enable()
from nemo_brain.training.entry import launch
from nemo_brain.training.brain.run import run
from test_supervision import Fails
launch(Path({root!r}) / "conf", "toy", lambda cfg: run(cfg, callbacks=[Fails(False)]))
"""


def test_torchrun_shows_the_first_failure_as_the_root_cause(tmp_path, warm_python):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), here=str(Path(__file__).parent)))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", str(script)]
    command = [sys.executable, *launcher, f"run_dir={tmp_path}/run", *QUIET, *SMALL]
    environment = {**os.environ, "PYTHON_EXEC": str(warm_python)}  # what torchrun starts instead of python
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 1
    *_, summary = done.stderr.split("Root Cause (first observed failure)")
    assert "rank      : 1 (local_rank: 1)" in summary and "KeyError: 'the first cause'" in summary, done.stderr


def test_waiting_for_a_server_must_end_before_the_others_give_up():
    with pytest.raises(
        ValueError, match=r"reward\.parts\.0\.timeout_seconds \(1800\) must be less than trainer\.hang_ti"
    ):
        check(toy_config("+reward.parts=[{timeout_seconds: 1800}]"))
    check(toy_config("+reward.parts=[{timeout_seconds: 1800}]", "trainer.hang_timeout_minutes=31"))
    remote = "rollout.remote={url: http://localhost, model: m, timeout_seconds: 60}"
    with pytest.raises(ValueError, match=r"rollout\.remote\.timeout_seconds \(60\) must be less than"):
        check(toy_config(remote, "trainer.hang_timeout_minutes=1", "trainer.max_iterations=1"))


def test_a_rank_that_knows_how_the_run_ends_is_counted_once():
    """By its supervisor and by the thread that has failed: otherwise rank 0 would end while another has not heard."""
    watch = object.__new__(supervision._Watch)
    watch._heard, watch._lock = False, threading.Lock()
    watch._store = dist.HashStore()
    both = [threading.Thread(target=watch._hear) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert watch._store.add(supervision._HEARD, 0) == 1
