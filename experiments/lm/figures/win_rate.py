"""Figure 4: win-rate against people's answers by n, from nested subsets of one file of the prior's outputs."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.lm.bands import interval, slope
from experiments.lm.plan import TUNED_ON, Plan
from experiments.page import plus_minus, table
from experiments.results import Results

DESIGNS = {"prompts": "equal prompts: one group of n", "outputs": "equal outputs: {most} in groups of n"}


def make(plan: Plan, results: Results) -> tuple[Figure, str]:
    runs, most = plan.win_rates(results), max(plan.settings["win_rate"]["sizes"])
    prior = results[plan.priors()[TUNED_ON]]["heldout"]["win"]
    found = {key: [results[run]["heldout"] for run in some] for key, some in runs.items()}
    made, panels = plots.figure(len(DESIGNS))
    rows, slopes = [], []
    for axes, (design, title) in zip(panels, DESIGNS.items(), strict=True):
        sizes = [n for kind, n in found if kind == design]
        for n in sizes:
            means = {
                key: np.mean([one[key] for one in found[design, n]], axis=0) for key in ("win", "reward", "kl", "gold")
            }
            rows.append([title.format(most=most), str(n), *(plus_minus(*interval(m.tolist())) for m in means.values())])
            mean, half = interval(means["win"].tolist())
            axes.errorbar(n, mean, yerr=half, fmt="o", color=plots.COLOURS["brain"], markersize=4, capsize=2)
            seeds = [interval(one["win"])[0] for one in found[design, n]]
            axes.scatter([n] * len(seeds), seeds, s=10, alpha=0.6, linewidths=0, color=plots.INK)
        axes.axhline(interval(prior)[0], color=plots.INK, linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_title(title.format(most=most))
        axes.set_xlabel("n")
        for key in ("win", "reward"):
            values = {n: [one[key] for one in found[design, n]] for n in sizes}
            slopes.append(
                f"{'win-rate' if key == 'win' else 'reward'} at equal {design} {plus_minus(*slope(values), 4)}"
            )
    panels[0].set_ylabel("win-rate against people's synopses")
    panels[1].sharey(panels[0])
    panels[1].autoscale()
    columns = ["design", "n", "win-rate", "reward", "KL", "gold"]
    return made, f"{table(columns, rows)}\n\nSlope on log2 n (95%, clustered by prompt): {'; '.join(slopes)}."
