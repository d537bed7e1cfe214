"""What a bundle brings along and what it expects agree with setup.py and constraints-cpu.txt; what its check says.

The archive itself (make bundle) is built by hand: it downloads a hundred packages.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from toy_runs import ROOT

from bundle import check, make

BUNDLE = ROOT / "bundle"


def names(file: str) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in check.pins(BUNDLE / file)}


def test_every_package_has_the_version_of_the_constraints():
    constraints = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    pinned = make.requirements()
    assert len(pinned) == len(set(pinned)) > 90
    assert set(pinned) < set(constraints)
    assert set(make.SOURCES) < {line.split("==")[0] for line in pinned}


def test_what_setup_py_asks_for_is_brought_along_or_expected():
    asked = re.search(r"install_requires=\[(.*?)\n    \]", (ROOT / "setup.py").read_text(), re.S)[1]
    asked = {canonicalize_name(Requirement(line).name) for line in re.findall(r'"(.+?)",', asked)}
    brought, expected = names("packages.txt"), names("expected.txt")
    assert not brought & expected
    # jinja2 comes with torch.
    assert asked - brought - expected == {"jinja2"}


def test_what_is_expected_is_what_setup_py_allows():
    asked = {
        Requirement(line).name: Requirement(line)
        for line in re.findall(r'"([a-z_]+[<>=].+?)"', (ROOT / "setup.py").read_text())
    }
    for line in check.pins(BUNDLE / "expected.txt"):
        expected = Requirement(line)
        if expected.specifier:
            assert expected.specifier == asked[expected.name].specifier, line


def test_the_check_says_what_is_missing_and_what_has_another_version():
    python = "{}.{}".format(*sys.version_info)
    expected = ["torch>=2.6", "torch>=99", "numpy<1", "no_such_package>=1", "pillow"]
    missing, other = check.faults(expected, python)
    assert missing == ["no_such_package>=1"]
    assert [line.partition(" is expected")[0] for line in other] == ["torch>=99", "numpy<1"]
    assert check.faults([], "3.9")[0][0].startswith("Python 3.9, which the bundle was built for")
    assert check.faults(check.pins(BUNDLE / "expected.txt"), python) == ([], [])


def test_the_check_runs_where_a_bundle_is_unpacked(tmp_path):
    for file in ("check.py", "expected.txt"):
        (tmp_path / "bundle").mkdir(exist_ok=True)
        shutil.copy(BUNDLE / file, tmp_path / "bundle")
    (tmp_path / "bundle" / "python.txt").write_text("{}.{}\n".format(*sys.version_info))
    command = [sys.executable, tmp_path / "bundle" / "check.py"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f". {tmp_path}/activate" in run.stdout
    with (tmp_path / "bundle" / "expected.txt").open("a") as file:
        file.write("no_such_package\n")
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "missing: no_such_package" in run.stdout


def test_the_project_comes_without_environments_and_caches(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for part in make.PROJECT:
        folder = (ROOT / part).is_dir()
        (source / part).mkdir(parents=True) if folder else (source / part).write_text("")
    (source / "benchmarks" / ".venv-trl").mkdir()
    (source / "nemo_brain" / "__pycache__").mkdir()
    (source / "nemo_brain" / "__main__.py").write_text("")
    target.mkdir()
    make.copy_project(source, target)
    assert {path.name for path in target.iterdir()} == set(make.PROJECT)
    assert [path.name for path in target.glob("*/*")] == ["__main__.py"]


def test_solvers_and_compiled_files_are_left_out():
    assert make.left_out("nemo_brain-py312/site/pulp/solverdir/cbc/linux/64/cbc")
    assert make.left_out("nemo_brain-py312/nemo_brain/__pycache__/logprobs.cpython-312.pyc")
    assert not make.left_out("nemo_brain-py312/site/pulp/pulp.py")


def test_activate_puts_the_bundle_before_what_is_installed(tmp_path):
    folder = tmp_path / "a bundle"
    folder.mkdir()
    (folder / "activate").write_text(make.ACTIVATE)
    script = f'. "{folder}/activate" && echo "$PYTHONPATH"'
    run = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={"PYTHONPATH": "/mine"}, check=True
    )
    assert run.stdout.strip() == f"{folder}/site:{folder}:/mine"
