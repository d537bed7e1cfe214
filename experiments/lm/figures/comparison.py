"""The main comparison: all methods on all tasks, each at the setting that tuning chose."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.lm.bands import interval
from experiments.lm.figures import LABELS
from experiments.lm.plan import Plan
from experiments.page import plus_minus, table
from experiments.results import Results

TASKS = {"synopses": "package synopses", "scitldr": "SciTLDR", "hh": "HH dialogues"}


def tasks(plan: Plan, results: Results) -> tuple[None, str]:
    """What is known of each task before training."""
    rows = []
    for task in plan.made(results):
        found = results[plan.priors()[task]]
        about, heldout = found["about"], found["heldout"]
        accuracy = "" if "pairs" not in about else f"{about['reward_accuracy']:.2f} / {about['gold_accuracy']:.2f}"
        rows.append(
            [
                TASKS[task],
                f"{about['unit']:.3f}",
                f"{about['correlation']:.2f}",
                plus_minus(*interval(heldout["win"])),
                f"{found['tokens']:.1f}",
                accuracy,
            ]
        )
    columns = [
        "task",
        "unit of the reward",
        "correlation of reward and gold",
        "prior's win-rate",
        "tokens of an output",
    ]
    return None, table([*columns, "held-out pairs that reward / gold order as people did"], rows)


def make(plan: Plan, results: Results) -> tuple[Figure, str]:
    parts = [_grid(plan, results)]
    made, panels = plots.figure(len(plan.made(results)), width=3.4)
    for axes, task in zip(panels, plan.made(results), strict=True):
        runs = plan.compared(results)[task]
        prior = results[plan.priors()[task]]["heldout"]
        found = {name: results[run]["heldout"] for name, run in runs.items()}
        parts.append(f"{TASKS[task]}, {len(prior['reward'])} held-out prompts:\n\n{_table(plan, prior, found, runs)}")
        for name, one in found.items():
            mean, half = interval(_less(one["reward"], prior["reward"]))
            look = {"color": plots.COLOURS[name], "markersize": 5, "capsize": 2}
            axes.errorbar(interval(one["kl"])[0], mean, yerr=half, fmt="o", label=LABELS[name], **look)
        axes.set_title(TASKS[task])
        axes.set_xlabel("KL(q, p), nats")
        axes.set_xlim(left=0)
    missing = [TASKS[task] for task in plan.worlds if task not in plan.made(results)]
    parts += [f"Not made yet: {', '.join(missing)}."] if missing else []
    panels[0].set_ylabel("reward less the prior's")
    panels[0].legend(loc="best")
    return made, "\n\n".join(parts)


def _table(plan: Plan, prior: dict, found: dict[str, dict], runs: dict[str, dict]) -> str:
    gamma = plan.settings["score_gamma"]
    columns = ["method", "coefficient", "rate", "reward", "KL", "gold", "win-rate", f"reward - {gamma:g} KL"]

    def row(name: str, one: dict[str, list[float]]) -> list[str]:
        score = np.array(one["reward"]) - gamma * np.array(one["kl"])
        values = [plus_minus(*interval(one[key])) for key in ("reward", "kl", "gold", "win")]
        return [name, *values, plus_minus(*interval(score.tolist()))]

    rows = []
    for name, one in found.items():
        objective = runs[name]["objective"]
        coefficient = objective[plan.settings["methods"][name]["coefficient"]]
        label, *values = row(LABELS[name], one)
        rows.append([label, f"{coefficient:g}", f"{runs[name]['rate']:g}", *values])
    label, *values = row("prior", prior)
    rows.append([label, "", "", *values])
    differences = []
    for name, one in found.items():
        if name != "brain":
            score = [_less(o["reward"], (gamma * np.array(o["kl"])).tolist()) for o in (found["brain"], one)]
            pairs = [(found["brain"][key], one[key]) for key in ("reward", "kl", "gold", "win")]
            cells = [plus_minus(*interval(_less(*pair))) for pair in [*pairs, tuple(score)]]
            differences.append([LABELS[name], *cells])
    shown = ["BRAIn less", "reward", "KL", "gold", "win-rate", f"reward - {gamma:g} KL"]
    return f"{table(columns, rows)}\n\nPaired over prompts:\n\n{table(shown, differences)}"


def _grid(plan: Plan, results: Results) -> str:
    """Every setting's score on the tuning prompts."""
    rates, chosen, rows = plan.settings["rates"], plan.chosen(results), []
    for name, runs in plan.grid().items():
        for value in plan.settings["methods"][name]["values"]:
            row = [LABELS[name], f"{value:g}"]
            for run in runs:
                if run["objective"][plan.settings["methods"][name]["coefficient"]] == value:
                    score = f"{plan.score(results[run]['tuning']):.3f}"
                    row.append(f"**{score}**" if run == chosen[name] else score)
            rows.append(row)
    columns = ["method", "coefficient", *(f"rate {rate:g}" for rate in rates)]
    return "Reward - KL / 4 on the tuning prompts:\n\n" + table(columns, rows)


def _less(ours: list[float], theirs: list[float]) -> list[float]:
    return (np.array(ours) - np.array(theirs)).tolist()
