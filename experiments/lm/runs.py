"""One run by its settings, in whichever process it is made.

Shapes: P prompts, N outputs of a prompt.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from experiments.lm import variance
from experiments.lm.evaluation import evaluate
from experiments.lm.training import train
from experiments.lm.world import World, make_world

KEPT = ("reward", "gold", "win", "kl")  # of each held-out prompt
DIGITS = 4  # of these


def make_run(run: dict[str, Any]) -> dict[str, Any]:
    """What a run's settings say: ``kind`` (prior, train, variance), ``task``, and what that kind takes."""
    began = time.monotonic()
    world = make_world(run["task"])
    if world.name != run["world"]:
        raise ValueError(f"{run['task']}: the prompts are not those of {run['world']}")
    result = {"prior": _prior, "train": _train, "variance": variance.measure}[run["kind"]](world, run)
    return {**result, "seconds": round(time.monotonic() - began)}


def _prior(world: World, run: dict[str, Any]) -> dict[str, Any]:
    """The prior's held-out outputs, the best of n of them by reward, and how the two scorers go together."""
    found = evaluate(world, world.model.prior, "heldout", run["outputs"])
    reward_PN, gold_PN = found["reward"], found["gold"]
    within_PN = [values_PN - values_PN.mean(-1, keepdim=True) for values_PN in (reward_PN, gold_PN)]
    correlation = float(torch.corrcoef(torch.stack([values_PN.flatten() for values_PN in within_PN]))[0, 1])
    ordered_PN, best = reward_PN.sort(-1).values, {}
    for n in run["best_of"]:
        # The chance that the k-th smallest of all is the best of n drawn without replacement.
        k = torch.arange(1, reward_PN.shape[1] + 1, dtype=torch.float64)
        below = torch.ones_like(k)
        for j in range(n - 1):
            below = below * (k - 1 - j).clamp(min=0) / (reward_PN.shape[1] - 1 - j)
        best[str(n)] = _kept(ordered_PN @ (below * n / reward_PN.shape[1]))
    about = {"unit": world.unit, "mean": world.mean, "correlation": correlation, **world.scorers.notes}
    return {"heldout": _prompts(found), "best_of": best, "about": about, "tokens": _mean(found, "tokens")}


def _train(world: World, run: dict[str, Any]) -> dict[str, Any]:
    policy, history = train(world, run)
    result: dict[str, Any] = {name: statistics.mean(step[name] for step in history) for name in ("norm", "ess")}
    for chosen in run["evaluated_on"]:
        found = evaluate(world, policy, chosen, run["outputs"])
        if chosen == "tuning":
            result["tuning"] = {name: _mean(found, name) for name in KEPT}
        else:
            result["heldout"] = _prompts(found)
            result |= {name: _mean(found, name) for name in ("log_ratio", "tokens")}
    return result


def _prompts(found: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: _kept(found[name].mean(-1)) for name in KEPT}


def _kept(values_P: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values_P.tolist()]


def _mean(found: dict[str, torch.Tensor], name: str) -> float:
    return float(found[name].mean())
