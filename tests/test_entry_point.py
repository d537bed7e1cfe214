"""The script as a user starts it: exit codes after signals, torchrun restarts. NeMo is imported anew each time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import RUN, compare, undisturbed
from toy_runs import QUIET, ROOT

from nemo_brain.interruption import EXIT_CODE
from nemo_brain.metrics import read_metrics
from nemo_brain.resume import read_status

SCRIPT = [str(ROOT / "examples" / "megatron_brain.py"), "--config-name", "toy"]


def start(launcher: list[str], run_dir: Path, *overrides: str) -> subprocess.Popen:
    # Or a restart would meet the addresses of the processes before it in the store that it shares with them.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [*launcher, *SCRIPT, f"run_dir={run_dir}", *RUN, *QUIET, *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    while len([r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "step"]) < steps:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_script_with_its_exit_code(tmp_path, number):
    process = start([sys.executable], tmp_path / "run", "trainer.max_iterations=1000")
    wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75, output
    assert f"stopped: signal {number.name}; saved" in output and "Traceback" not in output
    assert read_status(tmp_path / "run")["state"] == "interrupted"


def test_torchrun_restarts_go_on_by_themselves(tmp_path):
    """One of two ranks is killed; the job ends by itself with the result of the undisturbed one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    process = start(torchrun, tmp_path / "run", "checkpoint.every_steps=1")
    wait_for_steps(process, tmp_path / "run", 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in map(int, children) if b"megatron_brain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming from" in output
    compare(tmp_path / "run", undisturbed(ranks=2)[0], tolerance=0)
