"""The device of the tests marked ``gpu``: a card, or with NEMO_BRAIN_TEST_DEVICE=cpu this machine's CPU in its place.

So what they do can be tried without one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

DEVICE = torch.device(os.environ.get("NEMO_BRAIN_TEST_DEVICE", "cuda"))
ON_CARD = DEVICE.type == "cuda"
MISSING = "needs a GPU" if ON_CARD and not torch.cuda.is_available() else None


def cards() -> int:
    """How many ranks may have a device of their own."""
    return torch.cuda.device_count() if ON_CARD else 4


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """A wait for the card is an error."""
    if not ON_CARD:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
