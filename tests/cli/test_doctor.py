"""nemo-brain doctor says what is there, and ends with the first thing that will not work."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import nemo_brain
from nemo_brain.cli import doctor

ROOT = Path(__file__).resolve().parents[2]


def run(cwd: Path | str = ROOT, *paths: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    command = [sys.executable, "-m", "nemo_brain", "doctor"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_it_finds_nothing_wrong_here():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for fact in (
        f"nemo_brain {nemo_brain.__version__}, a checkout: {ROOT}/nemo_brain",
        f"nemo_toolkit {importlib.metadata.version('nemo_toolkit')}: ",
        f"torch {torch.__version__}, ",
        "layers: Megatron-core with norms of ours",
        "attention otherwise: block by block",
        "gloo adds over one process (1)",
        "GB free",
    ):
        assert fact in done.stdout
    assert done.stdout.endswith("Nothing was found that will not work.\n")


def test_it_goes_on_behind_a_fault_and_ends_with_the_first(tmp_path):
    """A package that stands before the installed one, and a directory where nothing can be written."""
    shadow = tmp_path / "megatron" / "core"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    (shadow / "package_info.py").write_text("__version__ = '0.14.0'")
    done = run("/proc", tmp_path)
    assert done.returncode == 1
    assert "WILL NOT WORK: megatron-core 0.14.0" in done.stdout and "WILL NOT WORK: RuntimeError" in done.stdout
    assert "WILL NOT WORK: /proc cannot be written" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"The first thing that will not work: megatron-core 0.14.0 ({shadow}/__init__.py)")


def test_a_requirement_that_is_missing_will_not_work_and_another_version_may(monkeypatch):
    assert doctor._unmet(Requirement("packaging")) is None
    assert doctor._unmet(Requirement("packaging<1")).endswith("<1 is what it was tried with")
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["packaging<1", "no-such>=1", "no-test; extra == 'test'"]
    )
    lines = doctor._package()
    assert [next(lines) for _ in range(3)][2] == "0 of 2 requirements are met"
    assert next(lines).startswith("differs: packaging ")
    with pytest.raises(doctor.Fault, match="no-such is not installed: pip install nemo_brain brings"):
        next(lines)


def test_it_takes_no_arguments():
    with pytest.raises(SystemExit, match="usage: nemo-brain doctor"):
        doctor.main(["--all"])
