"""examples/slurm under a real Slurm: whatever happens to a job, its metrics are an undisturbed run's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from held_runs import Hold
from resumed_runs import RUN, compare, undisturbed
from slurm import PATH, Slurm, missing, until
from toy_runs import QUIET, ROOT

from nemo_brain.report.run_dir import read_status

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"Slurm {missing()}")]
SECONDS = 300  # for whatever is waited for, on a machine that does much else


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as cluster:
        yield cluster


class Job:
    """The recipe's job, a process on each of two nodes; ``python``: what its PATH finds."""

    def __init__(self, slurm: Slurm, folder: Path, python: Path, *overrides: str, **variables: str):
        self.slurm, self.run_dir, self._log = slurm, folder / "run", folder / "log"
        options = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=0"]
        training = ["train", "--config-name", "toy", f"run_dir={self.run_dir}", *RUN, *QUIET, *overrides]
        self.id = slurm.submit(
            *options,
            f"--output={self._log}",
            ROOT / "examples" / "slurm" / "brain.sbatch",
            *training,
            PATH=f"{python.parent}:{PATH}",
            GLOO_SOCKET_IFNAME="cable0",
            **variables,
        )

    def __getitem__(self, name: str) -> str:
        return self.slurm.job(self.id)[name]

    def log(self) -> str:
        return self._log.read_text() + self.slurm.log() if self._log.exists() else self.slurm.log()

    def ended(self) -> str:
        until(lambda: self["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), SECONDS, self.log)
        return self["JobState"]

    def ends_undisturbed(self, restarts: int) -> None:
        assert self.ended() == "COMPLETED", self.log()
        assert self["Restarts"] == str(restarts)
        assert self.log().count("resuming from") == restarts, self.log()
        compare(self.run_dir, undisturbed(ranks=2)[0], tolerance=0)


@pytest.fixture
def held(slurm, tmp_path, warm_python) -> Iterator[tuple[Job, Hold]]:
    """A job that waits in its reward after step 8, on both nodes."""
    hold = Hold(tmp_path)
    job = Job(slurm, tmp_path, warm_python, *hold.overrides)
    until(lambda: hold.reached, SECONDS, job.log)
    yield job, hold


def test_a_job_over_two_nodes_gives_the_metrics_of_one_machine(slurm, tmp_path, warm_python):
    job = Job(slurm, tmp_path, warm_python)
    job.ends_undisturbed(restarts=0)
    assert job["NumNodes"] == "2"


def preempt(slurm: Slurm, job: Job) -> None:
    """By a job that is over soon."""
    other = slurm.submit("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    until(lambda: slurm.job(other)["JobState"] == "COMPLETED", SECONDS, job.log)


def test_a_preempted_job_saves_is_requeued_and_goes_on(slurm, held):
    job, hold = held
    preempt(slurm, job)
    assert read_status(job.run_dir) == {"state": "interrupted", "step": 8}, job.log()
    assert "stopped: signal SIGTERM" in job.log()
    hold.release()
    job.ends_undisturbed(restarts=1)


def scripted(folder: Path, script: str) -> Path:
    """A python that is a script for sh."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\ncd {folder}\n{script}\n")
    python.chmod(0o755)
    return python


def test_a_job_that_is_preempted_before_python_runs_is_requeued(slurm, tmp_path):
    """As long as a container takes to be unpacked nobody listens for signals."""
    job = Job(slurm, tmp_path, scripted(tmp_path, "mkdir begun-$RANK && exec sleep 600; exit 0"))
    until(lambda: all((tmp_path / f"begun-{rank}").exists() for rank in range(2)), SECONDS, job.log)
    preempt(slurm, job)
    assert job.ended() == "COMPLETED", job.log()
    assert job["Restarts"] == "1"


def test_a_failure_of_one_process_is_not_hidden_by_those_that_wait_for_it(slurm, tmp_path):
    """They would end with 75 if they were told to end."""
    waits = "trap 'exit 75' TERM; for i in $(seq 50); do sleep 0.1; done; exit 1"
    job = Job(slurm, tmp_path, scripted(tmp_path, f'[ "$RANK" = 1 ] && exit 1; {waits}'))
    assert job.ended() == "FAILED", job.log()
    assert job["ExitCode"] == "1:0" and job["Restarts"] == "0"


def test_a_job_saves_before_its_time_limit_and_goes_on(slurm, held):
    job, hold = held
    slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")  # a minute is the least
    until(lambda: job["Restarts"] == "1", SECONDS, job.log)
    slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert "stopped: signal SIGUSR1" in job.log()
    hold.release()
    job.ends_undisturbed(restarts=1)


def test_a_job_that_loses_a_node_goes_on_when_there_are_enough_again(slurm, held):
    job, hold = held
    slurm.power_off("brain2")
    hold.release()
    until(lambda: job["Restarts"] == "1", SECONDS, job.log)
    slurm.power_on("brain2")
    job.ends_undisturbed(restarts=1)


def test_a_job_with_a_wrong_key_fails_and_is_not_requeued(slurm, tmp_path, warm_python):
    job = Job(slurm, tmp_path, warm_python, "rollout.prompts_per_iterations=8")
    assert job.ended() == "FAILED"
    assert job["ExitCode"] == "1:0" and job["Restarts"] == "0"
    assert "prompts_per_iterations" in job.log()


def test_a_containers_image_is_named_to_srun(slurm, tmp_path, warm_python):
    """Which knows of none: there is no pyxis here."""
    job = Job(slurm, tmp_path, warm_python, CONTAINER_IMAGE="/shared/nemo_brain.sqsh")
    assert job.ended() == "FAILED"
    assert "srun: unrecognized option '--container-image=/shared/nemo_brain.sqsh'" in job.log()


def test_a_job_that_is_cancelled_saves_and_is_not_requeued(slurm, held):
    job, _ = held
    slurm.run("scancel", job.id)
    assert job.ended() == "CANCELLED"
    assert read_status(job.run_dir) == {"state": "interrupted", "step": 8}
    assert job["Restarts"] == "0"
