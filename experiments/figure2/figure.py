"""Figure 2: reward against KL to the prior at every checkpoint, below the exact optimal frontier; and the ladder."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments import plots
from experiments.page import plus_minus, table
from experiments.results import Results
from experiments.sweep import interval, reward_within, sweep
from experiments.world import Task, World, correlation, expected, kl

SHOWN = {"brain": "BRAIn", "dpo_sft": "DPO-sft", "rloo": "RLOO"}
ENDS = {"KL(q, p)": "kl", "reward": "reward", "gold reward": "gold", "win-rate": "win_rate"}
LADDER = {
    "dpo_sft": "DPO-sft: n = 2, argmax, samples of the prior",
    "dpo_sft_8": "n = 8",
    "brain_prior": "softmax for argmax, gamma for beta",
    "brain": "refreshed proposal: BRAIn",
}


def frontier(task: Task, gamma: float) -> tuple[float, float]:
    """KL(p_gamma, p) and E_{p_gamma} r on average over prompts: no policy of this KL has more reward."""
    target_PK = task.posterior(gamma)
    return float(kl(target_PK, task.prior_PK).mean()), float(expected(target_PK, task.rewards_PK).mean())


def reward_at(task: Task, budget: float) -> float:
    """The optimal frontier's reward at a KL, by bisection on gamma."""
    low, high = 0.01, 100.0  # the KL falls with gamma
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if frontier(task, middle)[0] > budget else (low, middle)
    return frontier(task, high)[1]


def make(world: World, settings: dict[str, Any], results: Results) -> tuple[Figure, str]:
    found = sweep(world, settings, results)
    made, (axes,) = plots.figure(1, width=6.4, height=4.2)
    line = [frontier(world.reported, float(gamma)) for gamma in torch.logspace(-0.9, 1.5, 60)]
    axes.plot(*zip(*line, strict=True), color=plots.INK, linewidth=1, label="optimal: p exp(r / gamma) / Z")
    for name, label in SHOWN.items():
        points = [p for curve in found[name][1] for run in curve.runs for p in run]
        x, y = [p["kl"] for p in points], [p["reward"] for p in points]
        axes.scatter(x, y, s=9, alpha=0.55, linewidths=0, color=plots.COLOURS[name], label=label)
    axes.set_xlabel("KL(q, p), nats")
    axes.set_ylabel("expected reward")
    axes.set_xlim(-0.1, 6.0)
    axes.legend(loc="lower right")
    return made, _tables(world.reported, settings, found)


def _tables(task: Task, settings: dict[str, Any], found: dict) -> str:
    budgets, seeds = settings["budgets"], range(len(settings["seeds"]))
    best = {
        name: [[reward_within([c.runs[s] for c in curves], [b]) for s in seeds] for b in budgets]
        for name, (_, curves) in found.items()
    }
    names = [*SHOWN, *(name for name in LADDER if name not in SHOWN)]
    columns = ["best reward within a KL of", *(f"{b:g}" for b in budgets), "Adam's rate"]
    label = {**LADDER, **SHOWN, "dpo_sft": "DPO-sft", "brain": "BRAIn"}

    def row(name: str, title: str) -> list[str]:
        return [title, *(plus_minus(*interval(values)) for values in best[name]), f"{found[name][0]:g}"]

    def gap(other: str) -> list[str]:
        pairs = zip(best["brain"], best[other], strict=True)
        differences = [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
        return [f"BRAIn less {label[other]}", *(plus_minus(*interval(values)) for values in differences), ""]

    optimal = ["optimal at that KL", *(f"{reward_at(task, b):.3f}" for b in budgets), ""]
    ladder = table(columns, [row(name, title) for name, title in LADDER.items()])
    points = [p for _, curves in found.values() for c in curves for run in c.runs for p in run]
    final = [
        [
            label[name],
            f"{c.value:g}",
            *(plus_minus(*interval([run[-1][key] for run in c.runs]), 2) for key in ENDS.values()),
        ]
        for name in SHOWN
        for c in found[name][1]
    ]
    agreement = correlation(task.prior_PK, task.rewards_PK, task.gold_PK)
    return "\n\n".join(
        [
            table(columns, [optimal, *(row(name, label[name]) for name in names[:3]), *map(gap, names[1:3])]),
            f"{len(points):,} checkpoints of the reported runs: the least gamma log Z - (E_q r - gamma KL(q, p)) over "
            f"prompts and {len(settings['bound_gammas'])} gammas is {min(p['slack'] for p in points):.1e}, on average "
            f"{statistics.mean(p['slack'] for p in points):.2f}. Correlation of the training with the gold reward "
            f"within a prompt, under the prior: {agreement:.2f}. The prior's win-rate against the references: "
            f"{float(task.win_rate(task.prior_PK).mean()):.3f}.",
            "At the end of the runs:",
            table(["method", "gamma or beta", *ENDS], final),
            "The ladder:",
            ladder,
        ]
    )
