"""Whole runs of the toy with MLflow and Weights & Biases, offline: what can be read back from their own files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import wandb
from ranks import run_ranks
from small_runs import SMALL, records, train
from toy_runs import toy_config
from wandb.proto.wandb_internal_pb2 import Record

from nemo_brain.training.brain.run import run

SETTINGS = (
    "logger.mlflow={experiment: toys}",
    "logger.wandb={project: toys, offline: true}",
    "optim.sched=null",
)
NAMES = ["id", "prompt", "reference", "output", "reward", "weight"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The directory of a run that was made longer after its two steps."""
    pytest.importorskip("mlflow")
    run_dir = tmp_path_factory.mktemp("loggers") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        longer = "checkpoint.allow_changes=[trainer.max_iterations]"
        for iterations in (2, 3):
            run_ranks(trained, 1, f"run_dir={run_dir}", longer, f"trainer.max_iterations={iterations}")
    return run_dir


def trained(*overrides: str) -> None:
    run(toy_config(*SMALL, *SETTINGS, *overrides))
    wandb.finish()  # what it does itself when a process ends, but for those that tests fork


def test_mlflow_has_the_numbers_and_samples_of_one_run(resumed, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(resumed / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["trainer.max_iterations"] == "2"  # those that it began with
    for kind, name in (("step", "loss"), ("iteration", "reward/mean"), ("eval", "eval/reward")):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [(r["step"], r[name]) for r in records(resumed, kind)]
    tables = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert tables == [
        f"samples/{name}.json"
        for name in ("final_000002", "final_000003", "start_000000", "train_000000", "train_000001", "train_000002")
    ]
    table = json.loads(Path(run.info.artifact_uri.removeprefix("file://"), tables[3]).read_text())
    assert table["columns"] == NAMES
    for row, expected in zip(table["data"], sampled(resumed, "train", 0), strict=True):
        # pandas, by which MLflow writes it, keeps ten digits behind the point.
        assert row[:4] == expected[:4] and row[4:] == pytest.approx(expected[4:], abs=1e-10)


def test_weights_and_biases_has_them_too(resumed):
    histories = [history(file) for file in sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))]
    assert len(histories) == 2  # it begins a run of its own each time
    for name, kind in (("loss", "step"), ("reward/mean", "iteration")):
        logged = [(row["trainer/global_step"], row[name]) for part in histories for row in part if name in row]
        assert logged == [(record["step"], record[name]) for record in records(resumed, kind)]
    (row,) = [row for row in histories[0] if "samples/train/path" in row and row["trainer/global_step"] == 0]
    (file,) = (resumed / "wandb").glob(f"offline-run-*/files/{row['samples/train/path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == NAMES and table["data"] == sampled(resumed, "train", 0)


def sampled(run_dir: Path, kind: str, iteration: int) -> list[list]:
    """The rows of a table, from samples.jsonl."""
    groups = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [
        [group["id"], group["prompt"], group["reference"], output["text"], output["reward"], output["weight"]]
        for group in groups
        if (group["kind"], group["iteration"]) == (kind, iteration)
        for output in group["outputs"]
    ]


def history(file: Path) -> list[dict]:
    """What was logged, from W&B's own file: LevelDB's log format, in blocks of 32 KiB behind a header."""
    data, place, record, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is no room for a record's head
            place += 32768 - place % 32768
            continue
        _, size, part = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # whole, or its last part
            parsed = Record.FromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
                )
    return rows


def test_a_dead_server_is_refused_before_training(tmp_path):
    pytest.importorskip("mlflow")
    with pytest.raises(AssertionError, match=r"ValueError: logger\.mlflow: http://127\.0\.0\.1:9 cannot be logged to"):
        train(tmp_path / "run", "logger.mlflow={tracking_uri: 'http://127.0.0.1:9'}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wandb_without_an_account_is_refused_before_training(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without a .netrc
    with pytest.raises(AssertionError, match=r"ValueError: logger\.wandb: W&B cannot be logged to .*offline=true"):
        train(tmp_path / "run", "logger.wandb={project: toys}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
