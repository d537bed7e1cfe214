"""What takes minutes and is the same for all runs, kept in build/figures-lm until ``make clean``."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("build") / "figures-lm"


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returned, now or in an earlier call of this name, in whichever process: the others wait for it.

    Names say all that it depends on.
    """
    path = FOLDER / f"{name}.pt"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            scratch = path.with_suffix(".part")
            torch.save(make(), scratch)
            os.replace(scratch, path)
    return torch.load(path, weights_only=False)
