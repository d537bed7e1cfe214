"""A run that is asked to end while it waits for something ends within seconds, saved, and goes on as if undisturbed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from completion_server import END, VOCAB, CompletionServer, save_model
from layouts import PP2, TP2
from ranks import run_ranks
from resumed_runs import compare, train, undisturbed, written

from nemo_brain.report.run_dir import read_status

# Rewards as in conf/toy.yaml, but a call hangs while the file of that name exists.
REWARD = """
import time
from pathlib import Path
from nemo_brain.rewards.toy import letter_fraction

def reward(prompts, outputs, *, references, metadata):
    if Path({hangs!r}).exists():
        Path({waiting!r}).touch()
        time.sleep(600)
    return letter_fraction(prompts, outputs, references=references, metadata=metadata)
"""


def _told(told: int, folder: Path, *arguments: str) -> tuple[str, float]:
    """One rank of a run; rank ``told`` gets SIGTERM when the reward is waited for. How it ended, and how soon."""
    asked_at = []

    def tell() -> None:
        while not (folder / "waiting").exists():
            time.sleep(0.05)
        asked_at.append(time.monotonic())
        if int(os.environ["RANK"]) == told:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    ended = train(*arguments)
    return ended, time.monotonic() - asked_at[0]


@pytest.mark.parametrize(
    ("ranks", "overrides", "told"),
    [(1, [], 0), (2, [TP2], 1), (2, [], 1), (2, [PP2], 0)],
    ids=["one process", "TP2, the rank that waits for the other", "DP2, one replica", "PP2"],
)
def test_a_reward_that_is_waited_for_does_not_keep_a_run_from_ending(tmp_path, ranks, overrides, told):
    """One rank alone gets the signal. torchrun kills after 30 seconds."""
    file, hangs = tmp_path / "my_reward.py", tmp_path / "hangs"
    file.write_text(REWARD.format(hangs=str(hangs), waiting=str(tmp_path / "waiting")))
    run_dir = tmp_path / "run"
    arguments = (
        str(run_dir),
        *overrides,
        f"reward.function={file}:reward",
        "checkpoint.allow_changes=[reward.function]",
    )
    hangs.touch()
    ends = run_ranks(_told, ranks, told, tmp_path, *arguments)
    assert ends[told][0] == "signal SIGTERM"
    assert all(ended != "finished" and seconds < 20 for ended, seconds in ends)
    assert read_status(run_dir) == {"state": "interrupted", "step": 0}
    hangs.unlink()
    assert run_ranks(train, ranks, *arguments) == ["finished"] * ranks
    expected, files = undisturbed(*overrides, ranks=ranks)
    compare(run_dir, expected, tolerance=0)
    assert written(run_dir) == files


@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (2, [PP2])], ids=["one process", "PP2"])
def test_an_inference_server_that_is_waited_for_does_not_keep_a_run_from_ending(tmp_path, ranks, overrides):
    answer = threading.Event()
    with CompletionServer(save_model(tmp_path / "other", VOCAB, END)) as server:
        server.before = lambda body: ((tmp_path / "waiting").touch(), answer.wait(120))
        remote = f"rollout.remote={{url: {server.url}, model: policy, timeout_seconds: 100}}"
        options = [remote, "rollout.rescore_proposal=false", "data.holdout=0", *overrides]
        ends = run_ranks(_told, ranks, 0, tmp_path, str(tmp_path / "run"), *options)
        answer.set()
    assert ends[0][0] == "signal SIGTERM"
    assert all(ended != "finished" and seconds < 20 for ended, seconds in ends)
    assert read_status(tmp_path / "run")["state"] == "interrupted"
