"""What ``pip install nemo_brain`` brings works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("nemo_brain", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", copy, copy], check=True)
    (found,) = copy.glob("*.whl")
    return found


def test_it_holds_every_file_of_the_package_and_the_configurations(wheel):
    files = {path.relative_to(ROOT) for path in (ROOT / "nemo_brain").rglob("*") if path.is_file()}
    wanted = {str(path) for path in files if "__pycache__" not in path.parts}
    wanted |= {f"nemo_brain/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert held == wanted


def test_the_toy_runs_from_it(wheel, tmp_path):
    """In an environment of its own, which only borrows the packages that nemo_brain needs from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    # A path in a .pth file comes behind the environment's own, and this checkout's own .pth file is not read there.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import nemo_brain; print(nemo_brain.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()) == site / "nemo_brain" / "__init__.py"
    done = subprocess.run(
        [python, "-m", "nemo_brain", "train", "--config-name", "toy", "trainer.max_iterations=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held-out reward" in done.stdout and (tmp_path / "runs" / "toy" / "report.html").is_file()
