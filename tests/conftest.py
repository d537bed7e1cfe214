"""One thread per rank (ranks share the cores); Megatron's CPU meaning before anything imports Megatron; tiers."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiers
import torch

from nemo_brain.host import cpu

torch.set_num_threads(1)
cpu.enable()

# What is compared there is shown as in a test.
pytest.register_assert_rewrite("parity", "resumed_runs", "reward_runs", "schemas", "ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has one tier: that of its marker, otherwise what it calls."""
    for item in items:
        tier = tiers.tier(item)
        item.add_marker(tier)
        if tier == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
