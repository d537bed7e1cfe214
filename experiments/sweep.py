"""Methods over coefficients and seeds, each method's learning rate tuned on prompts of their own before.

Every method has equally many rates to choose from, and unless its settings say so the same outputs and steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.results import Results
from experiments.training import train
from experiments.world import World

Checkpoints = list[dict[str, float]]


@dataclass(frozen=True)
class Curve:
    """A method at one coefficient: each seed's checkpoints."""

    value: float
    runs: list[Checkpoints]


def sweep(world: World, settings: dict[str, Any], results: Results) -> dict[str, tuple[float, list[Curve]]]:
    """For each method its rate and its curves on the reported prompts; runs that are known are not made again.

    Args:
        settings: of a figure (settings.yaml): ``methods``, ``seeds``, ``tuning``, ``bound_gammas`` and what all runs
            share.
    """
    found = {}
    for name, method in settings["methods"].items():
        rate = tuned_rate(world, settings, method, results)
        curves = [
            Curve(value, [_run(world, settings, method, value, rate, seed, "reported", results) for seed in seeds])
            for value, seeds in ((value, settings["seeds"]) for value in method["values"])
        ]
        found[name] = (rate, curves)
    return found


def tuned_rate(world: World, settings: dict[str, Any], method: dict[str, Any], results: Results) -> float:
    """The rate of the best mean score over the tuning values and seeds, on the tuning prompts."""
    tuning = settings["tuning"]
    scores = {}
    for rate in tuning["rates"]:
        runs = [
            _run(world, settings, method, value, rate, seed, "tuning", results)
            for value in method.get("tuned_at", method["values"])
            for seed in tuning["seeds"]
        ]
        if tuning["criterion"] == "frontier":
            scores[rate] = reward_within(runs, settings["budgets"])
        else:
            scores[rate] = -statistics.mean(run[-1][tuning["criterion"]] for run in runs)
    return max(scores, key=lambda rate: scores[rate])


def reward_within(runs: Sequence[Checkpoints], budgets: Sequence[float]) -> float:
    """The best reward at any checkpoint whose KL to the prior is within a budget, on average over budgets (nats)."""
    points = [point for run in runs for point in run]
    return statistics.mean(max(p["reward"] for p in points if p["kl"] <= budget) for budget in budgets)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the half width of its 95% interval from few seeds (Student's t)."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def _run(
    world: World,
    settings: dict[str, Any],
    method: dict[str, Any],
    value: float,
    rate: float,
    seed: int,
    prompts: str,
    results: Results,
) -> Checkpoints:
    run = {
        "objective": {**method["objective"], method["coefficient"]: value},
        "refresh": method["refresh"],
        "n": method["n"],
        "draws": method.get("draws", settings.get("draws")),
        "steps": settings["steps"],
        "steps_per_iteration": settings["steps_per_iteration"],
        "rate": rate,
        "seed": seed,
        "prompts": prompts,
        "world": world.name,
    }
    return results.get(run, lambda: train(world, run, settings["bound_gammas"])[0])
