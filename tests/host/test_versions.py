"""A host that does not work is named before a training starts, and so is one that stands before the installed one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import megatron.core
import nemo
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nemo_brain.host import versions
from nemo_brain.host.versions import Package

ROOT = Path(__file__).resolve().parents[2]
CHECK = [sys.executable, "-m", "nemo_brain.host.versions"]


def package(name: str, version: str | None, installed: str | None = None) -> Package:
    return Package(name, f"/site-packages/{name}/__init__.py", version, installed or version)


def test_the_installed_host_works():
    found = versions.installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check(found)
    by_name = {package.name: package for package in found}
    for name, module in {"nemo_toolkit": nemo, "megatron-core": megatron.core}.items():
        assert by_name[name].version == Version(module.__version__).public
        assert by_name[name].file == module.__file__


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("nemo_toolkit", "2.7.0"),
        ("nemo_toolkit", "2.7.3"),
        ("megatron-core", "0.15.3"),
        ("megatron-core", "0.16.0rc0"),
        ("megatron-core", "0.16.1"),
    ],
)
def test_versions_that_were_tried_are_not_spoken_of(name, version):
    tried = package(name, version)
    assert tried.broken is tried.shadowed is tried.untried is None


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        (
            "megatron-core",
            "0.17.0",
            r"0\.17\.0 .* does not work: .*inference_wrapper_config.*install megatron-core==0\.15\.\*",
        ),
        ("megatron-core", "0.18.2", r"megatron-core 0\.18\.2 .* does not work"),
        ("megatron-core", "0.14.0", r"ProcessGroupCollection"),
        ("nemo_toolkit", "3.0.0", r"nemo_toolkit 3\.0\.0 .* does not work: .*nemo\.collections\.llm.*==2\.7\.\*"),
    ],
)
def test_versions_known_to_fail_are_refused(name, version, message):
    with pytest.raises(ImportError, match=message):
        versions.check([package(name, version)])


def test_a_host_that_is_not_there_is_refused():
    with pytest.raises(ImportError, match=r"nemo_toolkit is not installed: install nemo_toolkit==2\.7\.\*"):
        versions.check([Package("nemo_toolkit", None, None, None)])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (package("nemo_toolkit", "2.6.0"), r"nemo_toolkit 2\.6\.0 has not been tried .*install nemo_toolkit==2\.7\.\*"),
        (package("lightning", "2.5.1"), r"lightning 2\.5\.1 has not been tried"),
        (package("lightning", None), r"lightning None has not been tried"),
        (
            package("megatron-core", "0.15.0", "0.15.3"),
            r"Python imports megatron-core 0\.15\.0 .* but 0\.15\.3",
        ),
    ],
)
def test_what_is_doubtful_is_warned_of(found, message):
    with pytest.warns(UserWarning, match=message) as said:
        versions.check([found])
    assert len(said) == 1


def test_other_versions_than_those_wanted_are_named():
    found = [package("megatron-core", "0.16.0"), package("nemo_toolkit", "2.7.0")]
    assert versions.unlike(found, [Requirement("megatron-core==0.16.*"), Requirement("nemo_toolkit==2.7.0")]) == []
    assert versions.unlike(found, [Requirement("megatron-core==0.15.3")]) == [
        "megatron-core==0.15.3 is wanted, Python imports megatron-core 0.16.0"
    ]


def test_the_check_of_a_container_passes_with_the_installed_host():
    wanted = [f"{package.name}=={package.version}" for package in versions.installed()]
    done = subprocess.run([*CHECK, *wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"megatron-core {Version(megatron.core.__version__).public} {megatron.core.__file__}" in done.stdout


@pytest.mark.parametrize("wanted", [[], ["megatron-core==0.15.3"]])
def test_the_check_of_a_container_fails_where_a_checkout_stands_before_the_installed_package(tmp_path, wanted):
    """As /opt/Megatron-LM on PYTHONPATH does."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise AssertionError('imported')\n")
    (core / "package_info.py").write_text("__version__ = '0.15.0+dev'\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([*CHECK, *wanted], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert f"megatron-core 0.15.0 {core}/__init__.py" in done.stdout
    assert f"Python imports megatron-core 0.15.0 from {core}/__init__.py, but " in done.stderr
    assert ("megatron-core==0.15.3 is wanted" in done.stderr) == bool(wanted)


def test_a_training_asks_before_it_imports_nemo(tmp_path):
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "nemo" / "package_info.py").write_text("__version__ = '3.0.0'\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import nemo_brain.training.brain.run"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "ImportError: nemo_toolkit 3.0.0" in done.stderr


def test_containers_are_built_with_hosts_that_were_tried():
    text = (ROOT / "Dockerfile").read_text()
    (of_the_image,) = re.findall(r"HOST_PACKAGES:-(.*)}", text)
    (over_an_image,) = re.findall(r'HOST_PACKAGES="(.+)"', text)
    for wanted in (of_the_image, over_an_image):
        requirements = [Requirement(word) for word in wanted.split()]
        found = [package(it.name, str(it.specifier).removeprefix("==").replace("*", "0")) for it in requirements]
        assert {package.name for package in found} == {"nemo_toolkit", "megatron-core"}
        assert versions.unlike(found, requirements) == []
        assert not any(package.broken or package.untried for package in found)
    pinned = (ROOT / "constraints-cpu.txt").read_text().replace("nemo-toolkit", "nemo_toolkit")
    assert all(f"\n{pin}\n" in pinned for pin in over_an_image.split())
