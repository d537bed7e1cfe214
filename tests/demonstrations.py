"""Toy demonstrations, and configurations to fine-tune on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from omegaconf import DictConfig
from toy_runs import QUIET, composed


def write_demonstrations(path: Path, count: int = 32) -> Path:
    """Completions of letters, of 1 to 14 tokens, one of them cut to 16 tokens; prompts of 5 or 6."""
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            completion = "".join(draw.choices("abcdefgh", k=20 if index == 3 else draw.randint(1, 13)))
            file.write(json.dumps({"prompt": f"Say {index}", "completion": completion}) + "\n")
    return path


def sft_config(*overrides: str) -> DictConfig:
    return composed("sft", *QUIET, *overrides)
