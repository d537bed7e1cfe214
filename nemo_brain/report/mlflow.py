"""A run in MLflow: its metrics, its samples as tables, its configuration as parameters.

All is sent by a thread, so that a training never waits for a server. Needs the package mlflow, or mlflow-skinny.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RUN_FILE = "mlflow_run.json"  # which run it is, for when this one is resumed
_AT_START = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # later MLflow's own hold
_QUEUED = 10_000
_LAST_SECONDS = 60.0  # that a training waits at its end for what is still to be sent


class MLflowLogger:
    """Goes on with the run that is named in ``run_dir``, or begins one. For rank 0.

    Args:
        run_dir: of the training; an earlier training's files have been moved aside.
        tracking_uri: None: ``MLFLOW_TRACKING_URI``, otherwise files in ``run_dir``.
        experiment, run_name: as in the configuration.
        parameters: of a new run; those of one that goes on stay.

    Raises:
        ValueError: MLflow is not installed, or there is no answer; names the key and the remedy.
    """

    def __init__(
        self,
        run_dir: Path,
        tracking_uri: str | None,
        experiment: str,
        run_name: str | None,
        parameters: Mapping[str, Any],
    ):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants it said
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ValueError(
                "logger.mlflow needs MLflow: pip install 'nemo_brain[mlflow]', or set it to null"
            ) from error
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlflow").resolve().as_uri()
        try:
            with _environment(_AT_START):
                self._client = MlflowClient(tracking_uri=uri)
                self._run = self._begin(
                    run_dir / RUN_FILE, uri, experiment, run_name or run_dir.resolve().name, parameters
                )
                self._tables = {file.path for file in self._client.list_artifacts(self._run, "samples")}
        except Exception as error:  # MLflow's own, requests', a database's
            raise ValueError(
                f"logger.mlflow: {uri} cannot be logged to ({type(error).__name__}: {error}): start the server, "
                "correct logger.mlflow.tracking_uri, or set logger.mlflow=null"
            ) from error
        self._lost = 0
        self._queue: queue.Queue[Callable[[], Any] | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in numbers.items()]
        self._put(lambda: self._client.log_batch(self._run, metrics))

    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        """A table of its own for every step; one that is there already, from before the run was resumed, stays."""
        name = f"{key}_{step:06d}.json"
        if name in self._tables:
            return
        self._tables.add(name)
        table = {column: [row[i] for row in data] for i, column in enumerate(columns)}
        self._put(lambda: self._client.log_table(self._run, table, name))

    def finish(self, state: str) -> None:
        """Says how the training has ended, and waits a while for what is still to be sent."""
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[state]
        self._put(lambda: self._client.set_terminated(self._run, status))
        self._put(None)
        self._thread.join(_LAST_SECONDS)
        lost = self._lost + self._queue.qsize()
        if lost:
            warnings.warn(f"logger.mlflow: {lost} records did not get there; the run directory has them", stacklevel=2)

    def _begin(self, file: Path, uri: str, experiment: str, name: str, parameters: Mapping[str, Any]) -> str:
        """The id of the run."""
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(file.read_text(encoding="utf-8"))
            if earlier["tracking_uri"] == uri:
                self._client.update_run(earlier["run_id"], status="RUNNING")
                return str(earlier["run_id"])
        run = str(self._client.create_run(number, run_name=name).info.run_id)
        params = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
        for start in range(0, len(params), 100):  # MLflow's limits
            self._client.log_batch(run, params=params[start : start + 100])
        file.write_text(json.dumps({"tracking_uri": uri, "run_id": run}) + "\n", encoding="utf-8")
        return run

    def _put(self, work: Callable[[], Any] | None) -> None:
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._lost += 1

    def _send(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:
                if not self._lost:
                    warnings.warn(
                        f"logger.mlflow: a record did not get there, the training goes on ({type(error).__name__}: "
                        f"{error})",
                        stacklevel=1,
                    )
                self._lost += 1


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while, where they are not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
