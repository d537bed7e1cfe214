"""A run in MLflow: what is written there, when it goes on, and what becomes of it without a server."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_brain.report import mlflow as ours
from nemo_brain.report.metrics import COLUMNS, MetricsWriter
from nemo_brain.report.mlflow import MLflowLogger

ROW = ["a", "x", None, "y", 1.5, 0.25]


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    return lambda run_dir: mlflow.MlflowClient(tracking_uri=(run_dir / "mlflow").as_uri())


def logger_of(run_dir: Path, uri: str | None = None, name: str | None = None, **parameters) -> MLflowLogger:
    run_dir.mkdir(exist_ok=True)
    return MLflowLogger(run_dir, uri, "experiment", name, parameters)


def the_runs(client):
    return client.search_runs([client.get_experiment_by_name("experiment").experiment_id])


def test_metrics_samples_and_parameters_are_there(tmp_path, client, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = logger_of(tmp_path / "my_run", **{f"section.key_{i}": i for i in range(150)}, long="x" * 10_000)
    for step in (1, 2):
        logger.log_metrics({"loss": 1 / step, "reward/mean": step}, step)
        logger.log_table("samples/train", COLUMNS, [ROW, [*ROW[:4], None, None]], step)
    logger.finish("finished")
    (run,) = the_runs(client(tmp_path / "my_run"))
    assert (run.info.run_name, run.info.status) == ("my_run", "FINISHED")
    assert len(run.data.params) == 151 and run.data.params["section.key_149"] == "149"
    history = client(tmp_path / "my_run").get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    (first, second) = sorted(Path(run.info.artifact_uri.removeprefix("file://"), "samples").iterdir())
    assert (first.name, second.name) == ("train_000001.json", "train_000002.json")
    assert json.loads(first.read_text()) == {"columns": COLUMNS, "data": [ROW, [*ROW[:4], None, None]]}


def test_a_resumed_run_is_the_same_run_and_its_tables_are_there_once(tmp_path, client):
    for step in (1, 2):
        logger = logger_of(tmp_path, name="one", key=step)
        logger.log_metrics({"loss": 1.0}, step)
        logger.log_table("samples/train", COLUMNS, [ROW], 1)
        logger.finish("interrupted" if step == 1 else "failed")
    (run,) = the_runs(client(tmp_path))
    assert (run.info.status, run.data.params) == ("FAILED", {"key": "1"})
    assert [metric.step for metric in client(tmp_path).get_metric_history(run.info.run_id, "loss")] == [1, 2]
    (file,) = Path(run.info.artifact_uri.removeprefix("file://"), "samples").iterdir()
    assert len(json.loads(file.read_text())["data"]) == 1


def test_another_store_or_run_directory_has_a_run_of_its_own(tmp_path, client):
    elsewhere = f"file://{tmp_path}/elsewhere/mlflow"
    logger_of(tmp_path / "a").finish("finished")
    logger_of(tmp_path / "a", elsewhere).finish("finished")
    logger_of(tmp_path / "b", elsewhere).finish("finished")
    assert len(the_runs(client(tmp_path / "a"))) == 1 and len(the_runs(client(tmp_path / "elsewhere"))) == 2


def test_without_mlflow_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=r"logger\.mlflow needs MLflow: pip install 'nemo_brain\[mlflow\]'"):
        logger_of(tmp_path)


# Servers


class Server(ThreadingHTTPServer):
    """As much of MLflow's REST API as a run needs."""

    def __init__(self, folder: Path):
        self.batches: list[dict] = []
        self.delay = 0.0
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING", "artifact_uri": str(folder)}
        self.answers = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "experiment"}},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/get": {"run": {"info": info, "data": {}}},
        }
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        time.sleep(self.server.delay)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = self.path.partition("/api/2.0/mlflow/")[2].partition("?")[0]
        if name == "runs/log-batch":
            self.server.batches.append(json.loads(content))
        answer = json.dumps(self.server.answers.get(name, {})).encode()
        self.send_response(400 if b"refused" in content else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path, client):
    found = Server(tmp_path / "artifacts")
    yield found
    found.end()


def test_a_server_gets_it_while_the_training_goes_on(tmp_path, server):
    logger = logger_of(tmp_path, server.uri)
    server.delay = 0.5
    started = time.monotonic()
    for step in range(5):
        logger.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 2  # less than the server takes
    logger.finish("finished")
    assert [batch["metrics"][0]["step"] for batch in server.batches] == [0, 1, 2, 3, 4]


def test_a_server_that_is_not_there_is_an_error_before_the_training(tmp_path, client):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"logger\.mlflow: http://127\.0\.0\.1:9 cannot be logged to .*mlflow=null"):
        logger_of(tmp_path, "http://127.0.0.1:9")
    assert time.monotonic() - started < 60
    assert not (tmp_path / ours.RUN_FILE).exists()


def test_a_server_that_goes_away_is_a_warning_and_keeps_nobody_waiting(tmp_path, server, monkeypatch):
    monkeypatch.setattr(ours, "_LAST_SECONDS", 1.0)
    writer = MetricsWriter(tmp_path, [logger_of(tmp_path, server.uri)])
    server.end()
    started = time.monotonic()
    with pytest.warns(UserWarning, match=r"logger\.mlflow: [0-9]+ records did not get there; the run directory has"):
        for step in range(5):
            writer.write("step", step, {"loss": 1.0})
        writer.finish("finished")
    assert time.monotonic() - started < 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_what_a_server_refuses_is_a_warning(tmp_path, server):
    logger = logger_of(tmp_path, server.uri)
    with pytest.warns(UserWarning, match=r"a record did not get there, the training goes on"):
        logger.log_metrics({"refused": 1.0}, 0)
        logger.log_metrics({"loss": 1.0}, 1)
        logger.finish("finished")
    assert [batch["metrics"][0]["step"] for batch in server.batches] == [0, 1]
