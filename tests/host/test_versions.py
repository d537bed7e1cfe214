"""Host versions outside those that work are named before a training starts."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from nemo_brain.host import versions

TRIED = {"nemo_toolkit": "2.7.3", "megatron-core": "0.15.3", "lightning": "2.4.0"}


def test_the_installed_versions_work():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check(versions.installed())
        versions.check(TRIED)


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("megatron-core", "0.16.1", r"megatron-core 0\.16\.1 does not work: .*no_weight_decay_cond.*==0\.15\.\*"),
        ("megatron-core", "0.16.0rc0+abc", r"megatron-core 0\.16\.0rc0\+abc does not work"),
        ("megatron-core", "0.14.0", r"ProcessGroupCollection"),
        ("nemo_toolkit", "3.0.0", r"nemo_toolkit 3\.0\.0 does not work: .*nemo\.collections\.llm.*==2\.7\.\*"),
    ],
)
def test_versions_known_to_fail_are_refused(package, version, message):
    with pytest.raises(ImportError, match=message):
        versions.check({**TRIED, package: version})


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("megatron-core", "0.18.0", r"megatron-core 0\.18\.0 has not been tried .*install megatron-core==0\.15\.\*"),
        ("nemo_toolkit", "2.6.0", r"nemo_toolkit 2\.6\.0 has not been tried"),
        ("lightning", "2.5.1", r"lightning 2\.5\.1 has not been tried"),
        ("megatron-core", None, r"megatron-core is not installed as a package"),
    ],
)
def test_versions_that_nobody_has_tried_are_warned_of(package, version, message):
    with pytest.warns(UserWarning, match=message) as said:
        versions.check({**TRIED, package: version})
    assert len(said) == 1


def test_a_training_asks_before_it_imports_nemo():
    code = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.16.0" if name == "megatron-core" else real(name)
try:
    import nemo_brain.training.brain.run
except ImportError as error:
    assert "megatron-core 0.16.0 does not work" in str(error), error
    assert not {"nemo", "megatron.core"} & sys.modules.keys()
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr
