"""Pushing an export with the real client to a hub on this machine: what is there then, and what is refused when."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from toy_runs import toy_config

from nemo_brain.config.brain import check
from nemo_brain.convert.export import MARK
from nemo_brain.convert.hub import check_push, push

REPO = "org/model"


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    found.use(monkeypatch)
    yield found
    found.end()


@pytest.fixture
def export(tmp_path) -> Path:
    directory = tmp_path / "my model"
    directory.mkdir()
    for name, content in {"config.json": "{}", "model.safetensors": "weights", MARK: "ours"}.items():
        (directory / name).write_text(content)
    return directory


def test_an_export_is_pushed_with_its_card_to_a_private_repository(hub, export):
    check_push(REPO)
    assert hub.repositories == {REPO: {}} and hub.private == {REPO}
    push(REPO, export, "# the card")
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# the card"}
    assert hub.repositories == {REPO: files}


def test_a_repository_that_is_there_stays_as_public_as_it_is(hub):
    hub.repositories[REPO] = {"old.txt": b"old"}
    check_push(REPO)
    assert hub.repositories == {REPO: {"old.txt": b"old"}} and not hub.private


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda hub, env: env.delenv("HF_TOKEN"),
            r"\(ValueError: HF_TOKEN is not set\): see that HF_TOKEN may write there",
        ),
        (lambda hub, env: env.setenv("HF_TOKEN", "hf_wrong"), r"401 Client Error"),
        (lambda hub, env: hub.refused.update({"/create": 403}), r"403 "),
        (lambda hub, env: hub.refused.update({"/preupload/main": 403}), r"403 "),
        (lambda hub, env: hub.end(), r"Connection"),
        (lambda hub, env: env.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), r"Offline.*HF_HUB_OFFLINE"),
    ],
    ids=["no token", "wrong token", "may not create", "may not write", "no hub", "offline"],
)
def test_what_cannot_be_pushed_to_is_found_out_before(monkeypatch, change, message):
    hub = Hub()
    hub.use(monkeypatch)
    change(hub, monkeypatch)
    from huggingface_hub.utils._http import reset_sessions

    reset_sessions()
    with pytest.raises(ValueError, match=rf"model\.push_to=org/model: it cannot be pushed to .*{message}") as caught:
        check_push(REPO)
    assert "hf_wrong" not in str(caught.value) and TOKEN not in str(caught.value)
    reset_sessions()


def test_a_push_that_fails_keeps_the_export_and_says_the_command_that_repeats_it(hub, export, capfd):
    check_push(REPO)
    hub.refused["/commit/main"] = 503
    with pytest.raises(ValueError, match=r"model\.push_to=org/model: the push failed \(.*503") as caught:
        push(REPO, export, "# the card")
    message = str(caught.value)
    assert f"the export is in {export}; push it with: HF_TOKEN=... hf upload" in message
    assert TOKEN not in message + "".join(capfd.readouterr())
    hub.refused.clear()
    command = shlex.split(message.partition("HF_TOKEN=... ")[2])
    assert command[0] == "hf"
    # As the console script does it; the environment has the token and the hub's address.
    subprocess.run([str(Path(sys.executable).with_name("hf")), *command[1:]], check=True, env=dict(os.environ))
    assert hub.repositories[REPO].keys() == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.push_to=org/name"], "model.push_to needs model.export_to"),
        (["model.push_to=name", "model.export_to=x"], "model.push_to must be organisation/name, not 'name'"),
        (["model.push_to=https://hub/org/name", "model.export_to=x"], "model.push_to must be organisation/name"),
    ],
)
def test_configurations_that_cannot_be_pushed(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(toy_config(*overrides))
