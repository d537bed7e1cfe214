"""The metrics of two whole runs are those on file: what moves them is seen, and is said in CHANGELOG.md.

Other tests compare a commit with itself, or with a formula. Where this one fails, a change of the mathematics was not
meant; or it was: then ``make golden`` records the files anew, and CHANGELOG.md says why they moved.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from golden_records import compare, read
from toy_runs import ROOT

GOLDEN = Path(__file__).resolve().parent
RUNS = ("toy", "smollm2")
# The kernels are the same on every x86-64 processor (tests/golden_runs.py), so here the numbers are equal bit for bit.
# Elsewhere sums are taken in another order: AVX2 and AVX-512 moved the toy's numbers by up to 2e-6 and, as long as no
# text was another one, SmolLM2's by 1e-5. A change of a learning rate by 1% moves them by 1e-3.
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """The directory of the files as they are now, from an interpreter that has its kernels from the start."""
    target = tmp_path_factory.mktemp("golden")
    subprocess.run([sys.executable, ROOT / "tests" / "golden_runs.py", target], check=True, cwd=ROOT)
    return target


@pytest.mark.slow
@pytest.mark.compatibility
@pytest.mark.parametrize("name", RUNS)
def test_the_metrics_are_those_on_file(name, found):
    compare(read(found / f"{name}.jsonl"), read(GOLDEN / f"{name}.jsonl"), RELATIVE)


@pytest.mark.parametrize("name", RUNS)
def test_no_number_may_move(name):
    """By a hundredth of its size and a thousandth, each by itself: the comparison can fail."""
    expected = read(GOLDEN / f"{name}.jsonl")
    for index, record in enumerate(expected):
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "proposal_gap":
                moved = [*expected[:index], {**record, key: value * 1.01 + 1e-3}, *expected[index + 1 :]]
                with pytest.raises(AssertionError):
                    compare(moved, expected, RELATIVE)
