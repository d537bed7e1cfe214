"""Figure 3: variance and signal-to-noise of the gradient estimates, by method, group size and proposal."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from experiments import plots
from experiments.gradients import SECTIONS
from experiments.lm.plan import Plan
from experiments.page import table
from experiments.results import Results

LABELS = {"dpg": "DPG, GDC", "gdc++": "GDC++", "gdc++ (group)": "GDC++, Z of the group", "brain": "BRAIn"}
LABELS["snis"] = "alpha_hat alone"
PROPOSALS = {"policy": "q' = q", "prior": "q' = p"}
ORDER = (("brain", "gdc++"), ("gdc++", "dpg"), ("brain", "snis"))


def make(plan: Plan, results: Results) -> tuple[Figure, str]:
    runs = plan.variances()
    found = {proposal: results[run]["prompts"] for proposal, run in runs.items()}
    sizes = next(iter(runs.values()))["sizes"]
    shown = sizes[len(sizes) // 2]
    made, panels = plots.figure(len(found))
    for axes, (proposal, prompts) in zip(panels, found.items(), strict=True):
        for method in ("dpg", "gdc++", "brain", "snis"):
            values = [prompt["methods"][f"{method}, {shown}"]["variance"] for prompt in prompts]
            axes.plot(
                range(1, len(values) + 1), values, "o", markersize=3, color=plots.COLOURS[method], label=LABELS[method]
            )
        axes.set_yscale("log")
        axes.set_title(f"{PROPOSALS[proposal]}, n = {shown}: variance")
        axes.set_xlabel("prompt")
    panels[0].legend(loc="best")
    rows, order, checks = [], [], []
    for proposal, prompts in found.items():
        rows += _rows(proposal, prompts, sizes)
        order += _order(proposal, prompts, sizes)
        checks.append(_checks(proposal, prompts, sizes))
    columns = ["proposal", "n", "method", "variance", "mean²", "mean² / variance"]
    signs = ["proposal", "variance of", *(f"n = {n}" for n in sizes)]
    return made, "\n\n".join(
        [
            f"Medians over {len(next(iter(found.values())))} prompts:\n\n{table(columns, rows)}",
            "\n".join(checks),
            f"On how many prompts (one-sided sign test):\n\n{table(signs, order)}",
        ]
    )


def _rows(proposal: str, prompts: list[dict[str, Any]], sizes: list[int]) -> list[list[str]]:
    rows = []
    for n in sizes:
        for method in SECTIONS:
            known = [prompt["methods"][f"{method}, {n}"] for prompt in prompts]
            medians = [statistics.median(one[key] for one in known) for key in ("variance", "mean_square")]
            ratio = statistics.median(one["mean_square"] / one["variance"] for one in known)
            rows.append([PROPOSALS[proposal], str(n), LABELS[method], *(f"{m:.4g}" for m in medians), f"{ratio:.3f}"])
    return rows


def _order(proposal: str, prompts: list[dict[str, Any]], sizes: list[int]) -> list[list[str]]:
    rows = []
    for better, worse in ORDER:
        row = [PROPOSALS[proposal], f"{LABELS[better]} below {LABELS[worse]}"]
        for n in sizes:
            pairs = [[prompt["methods"][f"{m}, {n}"]["variance"] for m in (better, worse)] for prompt in prompts]
            wins = sum(low < high for low, high in pairs)
            sign = stats.binomtest(wins, len(prompts), alternative="greater").pvalue
            row.append(f"{wins} of {len(prompts)} (p = {sign:.3f})")
        rows.append(row)
    return rows


def _checks(proposal: str, prompts: list[dict[str, Any]], sizes: list[int]) -> str:
    each = [[n * prompt["methods"][f"dpg, {n}"]["variance"] for n in sizes] for prompt in prompts]
    moved = [max(values) / min(values) - 1 for values in each]
    bound = max(prompt["bound"] for prompt in prompts)
    ess = statistics.median(prompt["ess"] for prompt in prompts)
    return (
        f"- {PROPOSALS[proposal]}: n times DPG's variance, which does not depend on n, differs between n by "
        f"{statistics.median(moved):.0%} (median; at most {max(moved):.0%}). BRAIn's longest estimate is {bound:.2f} "
        f"of its bound, twice the longest gradient in its group. Effective sample size of a pool's alpha: {ess:.0f}."
    )
