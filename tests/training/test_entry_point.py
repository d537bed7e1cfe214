"""The script as a user starts it: exit codes after signals, torchrun restarts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from held_runs import Hold
from ranks import free_port
from resumed_runs import RUN, compare, undisturbed
from toy_runs import QUIET, ROOT

from nemo_brain.core.signals import EXIT_CODE
from nemo_brain.report.metrics import read_metrics
from nemo_brain.report.run_dir import read_status

pytestmark = pytest.mark.slow
SCRIPT = [str(ROOT / "examples" / "megatron_brain.py"), "--config-name", "toy"]


def start(launcher: list[str | Path], run_dir: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    # Or a restart would meet the addresses of the processes before it in the store that it shares with them.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **variables}
    command = [*launcher, *SCRIPT, f"run_dir={run_dir}", *RUN, *QUIET, *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal signals the whole group of what it has started
    )


def workers(torchrun: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started; they are in sessions of their own."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"megatron_brain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_steps(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    while len([r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "step"]) < steps:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def at_terminal(launcher: list[str | Path], run_dir: Path) -> tuple[subprocess.Popen, int]:
    """The script in the foreground of a terminal, and the end at which one types and reads."""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [*launcher, *SCRIPT, f"run_dir={run_dir}", *RUN, *QUIET, "trainer.max_iterations=1000"],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    return process, keyboard


def shown(keyboard: int) -> str:
    """All that the terminal has shown, once nobody writes to it any more."""
    parts = []
    with contextlib.suppress(OSError):  # that is how its end reads
        while part := os.read(keyboard, 65536):
            parts.append(part)
    return b"".join(parts).decode()


def test_ctrl_c_at_a_terminal_saves_and_leaves_it_readable(tmp_path, warm_python):
    """The progress bar that stood there is gone, and what is said has lines of its own."""
    process, keyboard = at_terminal([warm_python], tmp_path / "run")
    while len([r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]) < 2:
        assert process.poll() is None, shown(keyboard)
        time.sleep(0.02)
    os.write(keyboard, b"\x03")
    output = shown(keyboard)
    assert process.wait(60) == EXIT_CODE, output
    *_, said, ended = output.rstrip().partition("Ctrl-C: saving, then ending. A second Ctrl-C ends at once\r\n")
    assert said and "Traceback" not in output
    line = ended.rpartition("\r\n")[2]
    assert line.rpartition("\r")[2].startswith("stopped: signal SIGINT; the same command goes on"), ended
    assert read_status(tmp_path / "run")["state"] == "interrupted"


def test_ctrl_c_under_torchrun_saves_on_every_rank(tmp_path, warm_python):
    """The terminal signals torchrun, whose processes are in sessions of their own: it passes the signal on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    hold = Hold(tmp_path)
    process = start(torchrun, tmp_path / "run", *hold.overrides, PYTHON_EXEC=str(warm_python))
    hold.await_by(process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert output.count("stopped: signal SIGINT; the same command goes on") == 2, output
    assert output.count("Ctrl-C: saving, then ending") == 1 and "SIGKILL" not in output
    assert read_status(tmp_path / "run") == {"state": "interrupted", "step": 8}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_script_with_its_exit_code(tmp_path, number, warm_python):
    """One of them in an interpreter that begins and ends as a user's does."""
    process = start(
        [sys.executable if number == signal.SIGTERM else warm_python], tmp_path / "run", "trainer.max_iterations=1000"
    )
    wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75, output
    assert f"stopped: signal {number.name}; the same command goes on" in output and "Traceback" not in output
    assert read_status(tmp_path / "run")["state"] == "interrupted"


def test_torchrun_restarts_go_on_by_themselves(tmp_path, warm_python):
    """One of two ranks is killed; the job ends by itself with the result of the undisturbed one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    hold = Hold(tmp_path)
    process = start(torchrun, tmp_path / "run", *hold.overrides, PYTHON_EXEC=str(warm_python))
    hold.await_by(process)
    ranks = workers(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    hold.release()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming from" in output
    compare(tmp_path / "run", undisturbed(ranks=2)[0], tolerance=0)


@pytest.fixture
def nodes() -> list[tuple[list[str], str, str]]:
    """Two machines, as far as this one can make them: network namespaces joined by a cable, where that is permitted;
    otherwise both are this machine. Of each: what starts a command there, its address, and its network interface."""
    names = [f"nemo-brain-{os.getpid()}-{i}" for i in range(2)]
    addresses = ["10.213.7.1", "10.213.7.2"]

    def ip(*arguments: str) -> bool:
        return shutil.which("ip") is not None and not subprocess.run(["ip", *arguments], capture_output=True).returncode

    joined = all(ip("netns", "add", name) for name in names)
    joined = joined and ip(
        "link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "cable0", "netns", names[1]
    )
    for name, address in zip(names, addresses, strict=True):
        joined = joined and ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable0")
        joined = joined and all(ip("-n", name, "link", "set", device, "up") for device in ("lo", "cable0"))
    try:
        if joined:
            yield [(["ip", "netns", "exec", n], address, "cable0") for n, address in zip(names, addresses, strict=True)]
        else:
            yield [([], "127.0.0.1", "lo")] * 2
    finally:
        for name in names:
            ip("netns", "del", name)


def test_a_node_that_is_lost_and_comes_back_changes_nothing(tmp_path, nodes, warm_python):
    """Two torchrun agents with a process each. One agent and its process are killed, and the agent is started again."""
    port, hold = free_port(), Hold(tmp_path)

    def agent(node: int) -> subprocess.Popen:
        enter, address, interface = nodes[node]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        meeting = [f"--rdzv-endpoint={nodes[0][1]}:{port}", "--rdzv-backend=c10d", f"--rdzv-id={tmp_path.name}"]
        options = [*meeting, f"--rdzv-conf=is_host={node == 0}", f"--local-addr={address}", "--max-restarts=3"]
        launcher = [*enter, *torchrun, *options]
        variables = {"PYTHON_EXEC": str(warm_python), "GLOO_SOCKET_IFNAME": interface}
        return start(launcher, tmp_path / "run", "trainer.num_nodes=2", *hold.overrides, **variables)

    first, second = agent(0), agent(1)
    try:
        hold.await_by(first)
        for pid in (second.pid, *workers(second)):
            os.kill(pid, signal.SIGKILL)
        second.communicate()
        hold.release()
        second = agent(1)
        said, _ = first.communicate(timeout=300)
        assert first.returncode == 0 and "resuming from" in said, said
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 0, said
    finally:
        for process in (first, second):
            if process.poll() is None:
                process.terminate()  # its processes too
    compare(tmp_path / "run", undisturbed(ranks=2)[0], tolerance=0)
