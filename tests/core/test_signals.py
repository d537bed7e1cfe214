"""The first signal is heard wherever it comes, a second Ctrl-C ends at once: in processes that import nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest
from toy_runs import ROOT

from nemo_brain.core.signals import EXIT_CODE

# The main thread is in C and does not come back: Python's own handlers are never run.
BUSY = """
import hashlib, os
from nemo_brain.core import signals
signals.listen({receiver})
print("listening", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
HEARD = 'lambda number: os.write(1, f"heard {number.name}\\n".encode())'
AGAIN = 2.3  # seconds after which a Ctrl-C is another one


class Listening:
    """A process with a main thread that is busy."""

    def __init__(self, receiver: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", BUSY.format(receiver=receiver)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "listening\n"
        self.heard = ""

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def hears(self, number: signal.Signals) -> None:
        """Once at least: a main thread that is not busy yet tells the receiver too."""
        self.process.send_signal(number)
        before, self.heard = self.heard, f"heard {number.name}\n"
        while (line := self.process.stdout.readline()) != self.heard:
            assert line == before

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGUSR1])
def test_before_a_training_begins_it_ends_at_once_in_a_line(number):
    with Listening("") as listening:
        listening.process.send_signal(number)
        said = f"stopped: signal {number.name} before the training began: nothing is lost"
        assert listening.end() == (EXIT_CODE, f"\n{said}\n")


def test_a_second_ctrl_c_ends_at_once_but_not_the_first_sent_twice():
    """A terminal sends it to every process in the foreground, and a launcher among them sends it on."""
    with Listening(HEARD) as listening:
        for _ in range(3):
            listening.hears(SIGINT)
        assert listening.process.poll() is None
        time.sleep(AGAIN)
        listening.process.send_signal(SIGINT)
        code, said = listening.end()
        assert code == 130 and said.count("saving, then ending") == 1 and "a second Ctrl-C" in said


def test_torchruns_second_ctrl_c_is_sigterm_but_sigterm_alone_may_come_again():
    with Listening(HEARD) as listening:
        listening.hears(SIGTERM)
        time.sleep(AGAIN)
        for number in (SIGTERM, SIGUSR1, SIGINT):
            listening.hears(number)
        time.sleep(AGAIN)
        listening.hears(SIGUSR1)
        assert listening.process.poll() is None
        listening.process.send_signal(SIGTERM)
        assert listening.end()[0] == 130


FORKING = """
import os, signal, time
from nemo_brain.core import signals
heard = []
signals.listen(heard.append)
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
time.sleep(0.2)
print(ended, heard)
"""


def test_a_signal_of_a_forked_process_is_its_own():
    """Ctrl-C reaches a reward's worker processes too: the run ends them when it ends."""
    printed = subprocess.run([sys.executable, "-c", FORKING], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == f"{-SIGTERM} []\n"


def caught(pid: int) -> int:
    """The signals that a process has handlers for, as bits."""
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("SigCgt")).split()[1], 16)


@pytest.mark.parametrize("kind", ["brain", "sft", "reward_model"])
def test_a_script_can_be_interrupted_while_it_imports(kind):
    process = subprocess.Popen(
        [sys.executable, f"examples/megatron_{kind}.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not caught(process.pid) >> SIGUSR1 - 1 & 1:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE
    assert said == "\nstopped: signal SIGINT before the training began: nothing is lost\n"


@pytest.mark.parametrize("script", ["convert", "serve_reward"])
def test_the_other_scripts_end_in_a_line_too(script):
    process = subprocess.Popen(
        [sys.executable, f"examples/{script}.py"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(SIGINT, signal.SIG_DFL),
    )
    while "libtorch" not in open(f"/proc/{process.pid}/maps").read():  # noqa: SIM115
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.startswith("stopped by Ctrl-C"), said
