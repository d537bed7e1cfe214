"""Whole runs of the toy that push what they export: two ranks, and a hub on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from models import tensors_of
from ranks import run_ranks
from small_runs import NO_VALIDATION, SMALL
from toy_runs import toy_config

from nemo_brain.training.brain.run import run

ONE = ("trainer.max_iterations=1", "optim.sched=null", NO_VALIDATION)


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    found.use(monkeypatch)
    yield found
    found.end()


def pushed(run_dir: Path) -> str | None:
    """What a rank of a run ends with."""
    where = (f"run_dir={run_dir}", f"model.export_to={run_dir}/exported", "model.push_to=org/toy")
    try:
        run(toy_config(*SMALL, *ONE, *where))
    except ValueError as error:
        return str(error)
    return None


def test_the_export_is_pushed_with_a_card_and_the_token_is_written_nowhere(hub, tmp_path, capfd):
    assert run_ranks(pushed, 2, tmp_path / "run") == [None, None]
    (files,) = hub.repositories.values()
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    (tmp_path / "pulled").mkdir()
    for name, content in files.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    ours = tensors_of(tmp_path / "run" / "exported")
    assert all(tensor.equal(ours[name]) for name, tensor in tensors_of(tmp_path / "pulled").items())
    assert "# toy\n" in files["README.md"].decode() and "training speed" in files["README.md"].decode()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*written, *files.values()])
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_push_that_fails_ends_a_finished_run_with_an_error_on_every_rank(hub, tmp_path):
    hub.refused["/commit/main"] = 503
    first, second = run_ranks(pushed, 2, tmp_path / "run")
    assert first == second and first.startswith("model.push_to=org/toy: the push failed")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists() and (
        tmp_path / "run" / "report.html"
    ).exists()


def test_what_cannot_be_pushed_to_is_refused_on_every_rank_before_training(hub, tmp_path):
    hub.refused["/create"] = 403
    first, second = run_ranks(pushed, 2, tmp_path / "run")
    assert first == second and first.startswith("model.push_to=org/toy: it cannot be pushed to")
    assert not (tmp_path / "run").exists()
