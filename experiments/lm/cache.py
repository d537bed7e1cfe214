"""What takes minutes and is the same for all runs, kept in build/figures-lm until ``make clean``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("build") / "figures-lm"


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returned, now or in an earlier call of this name. Names say all that it depends on."""
    path = FOLDER / f"{name}.pt"
    if not path.exists():
        made = make()
        FOLDER.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        torch.save(made, scratch)
        os.replace(scratch, path)
    return torch.load(path, weights_only=False)
