"""The ablation of the baseline, as a table."""

from __future__ import annotations

from typing import Any

from experiments.page import plus_minus, table
from experiments.results import Results
from experiments.sweep import interval, sweep
from experiments.world import World

SHOWN = {
    "kl_posterior_policy": "KL(posterior, q)",
    "regret": "gamma KL(q, posterior)",
    "kl": "KL(q, p)",
    "reward": "reward",
    "win_rate": "win-rate",
}


def make(world: World, settings: dict[str, Any], results: Results) -> tuple[None, str]:
    found = sweep(world, settings, results)
    rows = [
        [name, *(plus_minus(*interval([run[-1][key] for run in curves[0].runs])) for key in SHOWN), f"{rate:g}"]
        for name, (rate, curves) in found.items()
    ]
    return None, table(["baseline", *SHOWN.values(), "Adam's rate"], rows)
