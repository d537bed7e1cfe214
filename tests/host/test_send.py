"""What the host sends to a card goes from memory that the card can read by itself, and nothing waits for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import nemo_brain
from nemo_brain.host.send import sent


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", ["pin", "to"]), ("meta", ["to"]), ("cpu", ["to"])])
def test_tensors_for_a_card_are_pinned_first(device, expected, monkeypatch):
    calls = []
    move = torch.Tensor.to

    def to(tensor, where, dtype, non_blocking=False):
        assert str(where) == device and non_blocking
        calls.append("to")
        return move(tensor, "cpu", dtype)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pin") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    found = sent(torch.tensor([1, 2]), device, torch.float64)
    assert calls == expected and found.dtype == torch.float64 and found.tolist() == [1, 2]


def test_nothing_else_sends_without_waiting():
    """Of pages of the host's that may move, such a copy waits all the same. Those named here have pinned them."""
    package = Path(nemo_brain.__file__).parent
    own = {"host/send.py", "host/checkpointing.py", "rewards/megatron.py", "training/brain/prior.py"}
    found = {}
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        lines = [line.strip() for line in path.read_text().splitlines() if "non_blocking=" in line]
        if name not in own and (bad := [line for line in lines if not re.search(r"\.copy_\(pinned\(", line)]):
            found[name] = bad
    assert not found
