"""examples/node.sh: signals reach every process, and its exit code says how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from held_runs import Hold
from ranks import free_port
from resumed_runs import RUN, compare, undisturbed
from toy_runs import QUIET, ROOT

from nemo_brain.core.signals import EXIT_CODE
from nemo_brain.report.run_dir import read_status

pytestmark = pytest.mark.slow


@pytest.fixture
def start(warm_python):
    """A function that starts the node of a run of two processes, in a directory."""
    begun: list[subprocess.Popen] = []

    def start(folder: Path, *overrides: str) -> subprocess.Popen:
        port = str(free_port())
        variables = {
            "PET_NPROC_PER_NODE": "2",
            "PET_MASTER_PORT": port,
            "PATH": f"{warm_python.parent}:{os.environ['PATH']}",
        }
        training = ["train", "--config-name", "toy", f"run_dir={folder}/run", *RUN, *QUIET, *overrides]
        begun.append(
            subprocess.Popen(
                [ROOT / "examples" / "node.sh", *training],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_an_interrupted_node_saves_ends_with_75_and_goes_on(start, tmp_path, number):
    hold = Hold(tmp_path)
    node = start(tmp_path, *hold.overrides)
    hold.await_by(node)
    node.send_signal(number)
    said, _ = node.communicate(timeout=120)
    assert node.returncode == EXIT_CODE, said
    assert said.count(f"stopped: signal {number.name}") == 2
    assert read_status(tmp_path / "run") == {"state": "interrupted", "step": 8}
    hold.release()
    node = start(tmp_path, *hold.overrides)
    said, _ = node.communicate(timeout=240)
    assert node.returncode == 0 and "resuming from" in said, said
    compare(tmp_path / "run", undisturbed(ranks=2)[0], tolerance=0)


def test_a_process_that_is_killed_ends_the_node(start, tmp_path):
    hold = Hold(tmp_path)
    node = start(tmp_path, *hold.overrides)
    hold.await_by(node)
    first, *_ = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGKILL)
    said, _ = node.communicate(timeout=120)
    assert node.returncode == 128 + signal.SIGKILL, said


def test_a_wrong_key_ends_the_node_with_1(start, tmp_path):
    node = start(tmp_path, "rollout.prompts_per_iterations=8")
    said, _ = node.communicate(timeout=120)
    assert node.returncode == 1 and "prompts_per_iterations" in said
