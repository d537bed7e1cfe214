"""One thread per rank (ranks share the cores); Megatron's CPU meaning before anything imports Megatron; tiers."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports it: kernels run on CPU tensors, slowly

from collections.abc import Iterator

import cards
import hypothesis
import pytest
import tiers
import torch
from markupsafe import Markup
from warm_python import WarmPython

from nemo_brain.host import cpu

gc.disable()  # until all tests are imported
torch.set_num_threads(1)
cpu.enable()

# Test processes share the cores: a call may take long for no reason of its own.
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")

# What the helpers compare is shown as in a test.
pytest.register_assert_rewrite(*(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in sys.modules))


@pytest.fixture(autouse=True, scope="module")
def _undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """The charts of its report take half of a short run. They are drawn where reports or whole runs are tested."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "report" and request.path.name not in ("test_run.py", "test_sft.py"):
            patch.setattr("nemo_brain.report.charts._svg", lambda *_: Markup("<svg></svg>"))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has one tier: that of its marker, otherwise what it calls; those of the host are of compatibility."""
    for item in items:
        if item.path.parent.name == "host":
            item.add_marker("compatibility")
        tier = tiers.tier(item)
        item.add_marker(tier)
        if tier == "gpu" and cards.MISSING:
            item.add_marker(pytest.mark.skip(reason=cards.MISSING))


def pytest_collection_finish() -> None:
    """What is imported stays: the collector need not look at it again, nor copy its pages in every forked rank."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts at a request."""
    monkeypatch.setattr("nemo_brain.core.http._FIRST_DELAY", 0.02)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[Path]:
    """A program that stands for python and has imported NeMo."""
    with WarmPython() as warm:
        yield warm.python
