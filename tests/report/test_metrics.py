"""The run directory's files survive kills, resumes and odd numbers; progress and summary suit logs."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_brain.core.groups import Group, Output, Prompt, RewardedGroup
from nemo_brain.report import progress as progress_module
from nemo_brain.report.metrics import (
    MetricsWriter,
    read_metrics,
    read_samples,
    summarize,
    write_samples,
)
from nemo_brain.report.progress import LogProgress, progress
from nemo_brain.report.run_dir import rewind
from nemo_brain.report.summary import summary_lines
from nemo_brain.report.text import duration, number


def strict(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not standard JSON")

    return json.loads(line, parse_constant=refuse)


def test_records_are_standard_json_lines_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("step", 1, {"iteration": 1, "loss": torch.tensor(0.5), "grad_norm": float("inf")})
    # Read while the writer lives: the line must already be there.
    first = (tmp_path / "metrics.jsonl").read_text()
    assert first.endswith("\n")
    assert strict(first) == {"kind": "step", "step": 1, "iteration": 1, "loss": 0.5, "grad_norm": None}
    writer.write("eval", 1, {"iteration": 1, "eval/p_value": float("nan"), "eval/prompts": np.int64(3)})
    assert strict((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["eval/p_value"] is None
    assert [r["kind"] for r in read_metrics(tmp_path / "metrics.jsonl")] == ["step", "eval"]


def test_loggers_receive_finite_numbers_with_the_step(tmp_path):
    class Logger:
        calls = ()

        def log_metrics(self, metrics, step):
            self.calls += ((metrics, step),)

    logger = Logger()
    MetricsWriter(tmp_path, [logger]).write("step", 7, {"iteration": 2, "loss": 1.5, "lr": float("nan"), "note": "x"})
    assert logger.calls == (({"iteration": 2, "loss": 1.5}, 7),)


def test_loggers_may_skip_steps_but_the_file_has_all(tmp_path):
    class Logger:
        steps = ()

        def log_metrics(self, metrics, step):
            self.steps += (step,)

    logger = Logger()
    writer = MetricsWriter(tmp_path, [logger], log_every_steps=3)
    for step in range(1, 8):
        writer.write("step", step, {"iteration": 0, "loss": 1.0})
    writer.write("iteration", 7, {"iteration": 0})
    assert logger.steps == (3, 6, 7)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(AssertionError):
        MetricsWriter(tmp_path).write("steps", 1, {})


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_cut_last_line_is_left_out_and_the_next_record_is_whole(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path)
    writer.write("step", 1, {"iteration": 1, "note": "größe"})
    writer.write("step", 2, {"iteration": 1, "note": "größe"})
    path.write_bytes(path.read_bytes()[:-cut])  # also in the middle of a character
    assert [r["step"] for r in read_metrics(path)] == ([1, 2] if cut == 1 else [1])
    MetricsWriter(tmp_path).write("step", 2, {"iteration": 1, "note": "again"})
    assert [(r["step"], r["note"]) for r in read_metrics(path)] == [(1, "größe"), (2, "again")]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": \n{"kind": "step", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_resumed_run_writes_each_step_once(tmp_path):
    """To metrics.jsonl and TensorBoard, which keeps a file per process and has seen the steps that come again."""

    def logged(steps: dict[int, float], goes_on_from: int | None = None) -> int:
        """Bytes of metrics.jsonl after the first step."""
        logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
        writer, sizes = MetricsWriter(tmp_path, [logger]), []
        if goes_on_from is not None:
            writer.purge_after(goes_on_from)
        for step, loss in steps.items():
            writer.write("step", step, {"iteration": 1, "loss": loss})
            sizes.append((tmp_path / "metrics.jsonl").stat().st_size)
        logger.experiment.close()
        return sizes[0]

    size = logged({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    rewind(tmp_path, {"metrics.jsonl": size})
    logged({2: 20.0, 3: 30.0}, goes_on_from=1)
    expected = [(1, 1.0), (2, 20.0), (3, 30.0)]
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_only_tensorboard_is_told_that_steps_come_again(tmp_path):
    class Logger:  # as W&B's, which has an experiment of another kind
        experiment = object()

    MetricsWriter(tmp_path, [Logger()]).purge_after(3)


def test_samples_keep_text_rewards_and_weights(tmp_path):
    text = "a\u2028b\nc\ud800"  # a line separator, a newline, half a surrogate pair
    outputs = [Output([1], text, True), Output([1], "z", True)]
    group = RewardedGroup(Prompt("p", "x", [1], reference="gold"), outputs, rewards=[1.0, float("nan")])
    write_samples(tmp_path, 3, [group], "train", alpha=torch.tensor([[0.75, 0.25, 0.0]]))
    write_samples(tmp_path, 0, [Group(group.prompt, outputs)], "start")
    train, start = read_samples(tmp_path / "samples.jsonl")
    assert (train["iteration"], train["kind"], train["id"], train["prompt"], train["reference"]) == (
        3,
        "train",
        "p",
        "x",
        "gold",
    )
    assert train["outputs"][0] == {"text": "a\u2028b\nc?", "reward": 1.0, "weight": 0.75}
    assert train["outputs"][1] == {"text": "z", "reward": None, "weight": 0.25}
    assert start["outputs"][0] == {"text": "a\u2028b\nc?", "reward": None, "weight": None}


def test_a_full_disk_is_named_with_the_remedy(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    full = rf"^run_dir={tmp_path}: cannot write there \(No space left on device\); set run_dir to .* with room"
    with pytest.raises(ValueError, match=full):
        MetricsWriter(tmp_path).write("step", 1, {"loss": 1.0})
    with pytest.raises(ValueError, match=full):
        write_samples(tmp_path, 0, [Group(Prompt("a", "x", [1]), [])], "train")


def test_summary_sums_up_the_records():
    run = summarize(
        [
            {"kind": "eval", "step": 0, "eval/reward": 0.0},
            {"kind": "step", "step": 1, "tokens": 300, "step_seconds": 1.0, "tokens_per_second": 300},
            {"kind": "step", "step": 2, "tokens": 300, "step_seconds": 3.0, "tokens_per_second": 100},
            {"kind": "iteration", "sample_seconds": 2.0, "score_seconds": None, "peak_memory_gib": 3.0},
            {"kind": "iteration", "sample_seconds": 3.0, "score_seconds": 0.5, "train_seconds": 4.0},
            {"kind": "eval", "step": 2, "eval/reward": 1.0},
        ]
    )
    assert (run.iterations, run.steps, run.start["eval/reward"], run.last["eval/reward"]) == (2, 2, 0.0, 1.0)
    assert (run.sample_seconds, run.score_seconds, run.train_seconds, run.step_seconds) == (5.0, 0.5, 4.0, 4.0)
    # 600 tokens in 4 s; the mean of the steps' rates would be 200.
    assert (run.train_tokens_per_second, run.peak_memory_gib) == (150.0, 3.0)


def test_summary_lines_say_what_changed():
    record = {
        "kind": "eval",
        "iteration": 4,
        "eval/start_reward": 0.125,
        "eval/reward": 0.5,
        "eval/reward_ci_low": 0.4,
        "eval/reward_ci_high": 0.6,
        "eval/reward_difference": 0.375,
        "eval/p_value": 0.0004,
        "eval/win_rate": 0.8,
        "eval/win_rate_ci_low": None,
        "eval/kl_to_prior": 12.34,
        "eval/prompts": 32,
    }
    text = "\n".join(summary_lines([record], {}, "runs/a/report.html"))
    assert "0.12 -> 0.50 (95% CI 0.40 to 0.60) on 32 prompts" in text
    assert "+0.38, p < 0.001 (paired t-test)" in text
    assert "80%\n" in text and "12.3 nats" in text and "runs/a/report.html" in text
    assert "reference" not in text
    assert "not evaluated" in summary_lines([], {}, "report.html")[0]


def test_numbers_and_durations_for_people():
    assert [number(v) for v in (None, 0.0, 0.0123, 0.5, 12.34, 12345.6, 7)] == [
        "n/a",
        "0.00",
        "0.012",
        "0.50",
        "12.3",
        "12,346",
        "7",
    ]
    assert [duration(s) for s in (4.21, 59.96, 185, 7620)] == ["4.2 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]


def test_without_a_terminal_a_line_every_ten_seconds(monkeypatch):
    clock, stderr = [0.0], io.StringIO()
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.delenv("RANK", raising=False)
    with progress(100, "sampling", "outputs") as bar:
        assert isinstance(bar, LogProgress)
        for _ in range(100):
            clock[0] += 0.25
            bar.update(1)
    lines = stderr.getvalue().splitlines()
    assert "\r" not in stderr.getvalue()
    assert lines[0] == "sampling: 40/100 (40%) outputs, 4 outputs/s, 10.0 s so far, 15.0 s left"
    assert len(lines) == 3 and lines[-1].startswith("sampling: 100/100 (100%)")


def test_short_work_and_other_ranks_are_silent(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("RANK", "0")
    with progress(10, "scoring", "outputs") as bar:
        bar.update(10)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    with progress(10, "scoring", "outputs") as bar:
        bar.update(10)
    assert stderr.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    with progress(10, "scoring", "outputs"):
        pass
    assert "scoring" in stderr.getvalue() and "0/10" in stderr.getvalue()


def test_these_rooms_import_neither_nemo_nor_megatron():
    code = (
        "import sys\nfrom nemo_brain.report import evaluate, metrics, progress, page\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('nemo', 'megatron')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_logger_that_fails_is_left_out_with_a_warning_and_the_others_go_on(tmp_path):
    class Logger:
        def __init__(self, fails_at):
            self.fails_at, self.steps = fails_at, []

        def log_metrics(self, metrics, step):
            self.steps.append(step)
            if step == self.fails_at:
                raise ConnectionError("gone")

    failing, steady = Logger(1), Logger(None)
    writer = MetricsWriter(tmp_path, [failing, steady])
    with pytest.warns(UserWarning, match="Logger fails, and gets nothing more of this run: ConnectionError: gone"):
        for step in range(3):
            writer.write("step", step, {"iteration": 0, "loss": 1.0})
    assert (failing.steps, steady.steps) == ([0, 1], [0, 1, 2])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_loggers_with_tables_are_given_the_samples_and_all_are_told_of_the_end(tmp_path):
    class Logger:
        calls: tuple = ()

        def log_table(self, key, columns, data, step):
            self.calls += ((key, columns, data, step),)

        def finish(self, state):
            self.calls += (state,)

    logger = Logger()
    writer = MetricsWriter(tmp_path, [object(), logger])
    group = Group(Prompt("a", "x", [1], reference="r"), [Output([2], "y", True), Output([3], "z", True)])
    writer.write_samples(5, write_samples(tmp_path, 3, [group], "train", alpha=[[0.75, 0.25]]))
    writer.finish("finished")
    rows = [["a", "x", "r", "y", None, 0.75], ["a", "x", "r", "z", None, 0.25]]
    assert logger.calls == (
        ("samples/train", ["id", "prompt", "reference", "output", "reward", "weight"], rows, 5),
        "finished",
    )
