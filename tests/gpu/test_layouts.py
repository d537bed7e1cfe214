"""Layouts of several cards over NCCL equal one card: outputs, metrics and every gradient (see tests/parity.py)."""

from __future__ import annotations

import functools

import cards
import pytest
from layouts import PP2, SP, TP2, VIRTUAL
from parity import RUN, compare
from spawned import run_spawned
from toy_runs import recorded_run

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "TP2, sequence parallel": (2, [TP2, SP]),
    "PP2": (2, [PP2]),
    "PP2, 2 virtual stages": (2, [PP2, VIRTUAL]),
    "DP2, distributed optimizer, two pass": (
        2,
        ["optim.use_distributed_optimizer=true", "train.micro_batch_tokens=64"],
    ),
    "TP2 x PP2": (4, [TP2, PP2]),
}


@functools.cache
def one_card() -> dict:
    (run,) = run_spawned(recorded_run, 1, *RUN)
    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_card(name):
    ranks, overrides = LAYOUTS[name]
    if cards.cards() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    compare(one_card(), run_spawned(recorded_run, ranks, *RUN, *overrides))
