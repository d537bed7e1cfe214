"""Figure 2: reward against KL, BRAIn's and DPO-sft's runs with a band for the frontiers' difference, best-of-n."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.lm.bands import frontier_band, interval
from experiments.lm.figures import LABELS
from experiments.lm.plan import TUNED_ON, Plan
from experiments.page import plus_minus, table
from experiments.results import Results

TABLED = 5  # points of the KL axis that the page's table has


def make(plan: Plan, results: Results) -> tuple[Figure, str]:
    prior, runs = results[plan.priors()[TUNED_ON]], plan.frontier()
    found = {name: [results[run]["heldout"] for run in some] for name, some in runs.items()}
    made, (left, right) = plots.figure(2, width=4.6, height=3.8)
    best = [(math.log(int(n)) - (int(n) - 1) / int(n), interval(r)[0]) for n, r in prior["best_of"].items()]
    left.plot(
        *zip(*best, strict=True), "s--", color=plots.INK, linewidth=1, markersize=3, label="best of n of the prior"
    )
    rows = []
    for name, some in found.items():
        points = sorted((interval(one["kl"])[0], *interval(one["reward"])) for one in some)
        kls, means, halves = zip((0.0, *interval(prior["heldout"]["reward"])), *points, strict=True)
        look = {"color": plots.COLOURS[name], "markersize": 4, "capsize": 2, "linewidth": 1}
        left.errorbar(kls, means, yerr=halves, fmt="o-", label=LABELS[name], **look)
        for run, one in zip(runs[name], some, strict=True):
            value = run["objective"][plan.settings["methods"][name]["coefficient"]]
            cells = [plus_minus(*interval(one[key])) for key in ("kl", "reward", "gold", "win")]
            rows.append([LABELS[name], f"{value:g}", f"{run['rate']:g}", *cells, f"{results[run]['log_ratio']:.3f}"])
    left.set_xlabel("KL(q, p), nats")
    left.set_ylabel("reward")
    left.legend(loc="lower right")
    band = frontier_band(found["brain"], found["dpo_sft"], prior["heldout"]["reward"])
    right.axhline(0, color=plots.INK, linewidth=0.8)
    right.plot(band.kl_K, band.difference_K, color=plots.COLOURS["brain"])
    low_K, high_K = band.difference_K - band.half_K, band.difference_K + band.half_K
    right.fill_between(band.kl_K, low_K, high_K, color=plots.COLOURS["brain"], alpha=0.25, linewidth=0)
    right.set_title("BRAIn's frontier less DPO-sft's")
    right.set_xlabel("KL(q, p), nats")
    columns = ["method", "gamma or beta", "rate", "KL", "reward", "gold", "win-rate", "mean log q - log p"]
    places = np.linspace(0, len(band.kl_K) - 1, TABLED).round().astype(int)
    at = ["KL", *(f"{band.kl_K[k]:.2f}" for k in places)]
    gaps = ["BRAIn less DPO-sft", *(plus_minus(band.difference_K[k], band.half_K[k]) for k in places)]
    n_of = table(
        ["n", *prior["best_of"]],
        [
            ["KL at most", *(f"{kl:.2f}" for kl, _ in best)],
            ["reward", *(plus_minus(*interval(rewards)) for rewards in prior["best_of"].values())],
        ],
    )
    return made, "\n\n".join(
        [
            table(columns, rows),
            f"The frontiers' difference, with a band that holds all of it at once:\n\n{table(at, [gaps])}",
            _verdict(band),
            f"The best of n outputs of the prior by reward:\n\n{n_of}",
        ]
    )


def _verdict(band) -> str:
    above = band.kl_K[band.difference_K - band.half_K > 0]
    below = band.kl_K[band.difference_K + band.half_K < 0]
    sides = []
    for places, word in ((above, "above"), (below, "below")):
        if len(places):
            sides.append(
                f"{word} at {len(places)} of {len(band.kl_K)} points, {places[0]:.2f} to {places[-1]:.2f} nats"
            )
    return f"BRAIn's frontier is {'; '.join(sides) or 'nowhere set apart from that of DPO-sft'}."
