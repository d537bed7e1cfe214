"""Figure 4: exact win-rate against references by n, at equal prompts and at equal outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.page import plus_minus, table
from experiments.results import Results
from experiments.sweep import interval, sweep
from experiments.world import World, expected

DESIGNS = {"prompts": "equal prompts: one group of n", "outputs": "equal outputs: 16 in groups of n"}
SHOWN = {"win_rate": "win-rate", "reward": "reward", "kl": "KL(q, p)", "kl_posterior_policy": "KL(posterior, q)"}


def make(world: World, settings: dict[str, Any], results: Results) -> tuple[Figure, str]:
    found = sweep(world, settings, results)
    made, panels = plots.figure(len(DESIGNS))
    rows, slopes = [], []
    for axes, (design, title) in zip(panels, DESIGNS.items(), strict=True):
        chosen = {method["n"]: name for name, method in settings["methods"].items() if name.split()[0] == design}
        ends = {n: [run[-1] for run in found[name][1][0].runs] for n, name in chosen.items()}
        for n, points in ends.items():
            wins = [p["win_rate"] for p in points]
            axes.scatter([n] * len(wins), wins, s=14, linewidths=0, alpha=0.7, color=plots.COLOURS["brain"])
            values = (plus_minus(*interval([p[key] for p in points])) for key in SHOWN)
            rows.append([title, str(n), *values, f"{found[chosen[n]][0]:g}"])
        means = [interval([p["win_rate"] for p in points])[0] for points in ends.values()]
        axes.plot(list(ends), means, color=plots.COLOURS["brain"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ends), [str(n) for n in ends])
        axes.set_title(title)
        axes.set_xlabel("n")
        steps = [math.log2(n) for n in ends]
        per_seed = list(zip(*([p["win_rate"] for p in points] for points in ends.values()), strict=True))
        slope = interval([float(np.polyfit(steps, wins, 1)[0]) for wins in per_seed])
        slopes.append(f"{design} {plus_minus(*slope, 4)}")
    panels[0].set_ylabel("win-rate against the references")
    panels[1].sharey(panels[0])
    panels[1].autoscale()
    gamma = settings["methods"][next(iter(settings["methods"]))]["values"][0]
    target_PK = world.reported.posterior(gamma)
    posterior = float(world.reported.win_rate(target_PK).mean())
    reward = float(expected(target_PK, world.reported.rewards_PK).mean())
    text = [
        table(["design", "n", *SHOWN.values(), "Adam's rate"], rows),
        f"Slope of the win-rate on log2 n, equal {'; equal '.join(slopes)} (95% over the seeds' own slopes). The exact "
        f"posterior (gamma {gamma:g}) wins {posterior:.3f} at a reward of {reward:.3f}, the prior "
        f"{float(world.reported.win_rate(world.reported.prior_PK).mean()):.3f}.",
    ]
    return made, "\n\n".join(text)
