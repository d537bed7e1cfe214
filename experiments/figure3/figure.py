"""Figure 3: variance of the gradient estimates, with bias and signal-to-noise; the toy, and the exact world."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy import stats

from experiments import gradients, plots, toy
from experiments.page import table
from experiments.results import Results
from experiments.training import train
from experiments.world import World

LABELS = {"dpg": "DPG, GDC", "gdc++": "GDC++", "brain": "BRAIn", "snis": "alpha_hat alone"}
PROPOSALS = {"policy": "q' = q", "prior": "q' = p"}


def make(world: World, settings: dict[str, Any], results: Results) -> tuple[Figure, str]:
    toys = _toys(settings["toy"], results)
    found = _world(world, settings["world"], results)
    made, (left, middle, right) = plots.figure(3, width=3.6)
    means = settings["toy"]["means"]
    for method, label in LABELS.items():
        rows = [toys[mu, 8][method] for mu in means]
        left.plot(means, [row["variance"] for row in rows], "o-", markersize=3, color=plots.COLOURS[method], label=label)
        middle.plot(means, [row["signal_to_noise"] for row in rows], "o-", markersize=3, color=plots.COLOURS[method])
        variances = [prompt["methods"][f"{method}, 8"]["variance"] for prompt in found["policy"]]
        right.scatter(range(1, len(variances) + 1), variances, s=16, linewidths=0, color=plots.COLOURS[method])
    for axes, title in ((left, "toy, n = 8: variance"), (middle, "toy, n = 8: mean² / variance"), (right, "exact world, q' = q, n = 8: variance")):
        axes.set_title(title)
        axes.set_xlabel("mean of the proposal")
    left.set_yscale("log")
    left.legend(loc="upper left")
    right.set_yscale("log")
    right.set_xlabel("prompt")
    text = [_toy_table(settings["toy"], toys), *(_world_table(settings["world"], proposal, found[proposal]) for proposal in PROPOSALS)]
    return made, "\n\n".join([*text, _checks(settings["world"], found)])


def _toys(settings: dict[str, Any], results: Results) -> dict[tuple[float, int], dict[str, dict[str, float]]]:
    found = {}
    for mu in settings["means"]:
        for n in settings["sizes"]:
            run = {"toy": mu, "n": n, "groups": settings["groups"], "seed": settings["seed"]}
            found[mu, n] = results.get(run, lambda mu=mu, n=n: toy.measure(mu, n, settings["groups"], settings["seed"]))
    return found


def _world(world: World, settings: dict[str, Any], results: Results) -> dict[str, list[dict[str, Any]]]:
    """By proposal, a measurement for each prompt."""
    task, policy = world.reported, None
    found: dict[str, list[dict[str, Any]]] = {proposal: [] for proposal in PROPOSALS}
    for prompt in range(len(task.prompts_P2)):

        def measured(prompt: int = prompt) -> dict[str, Any]:
            nonlocal policy
            if policy is None:
                _, policy = train(world, settings["policy"], [1.0])
            with torch.no_grad():
                policy_K = policy.enumerate(task.prompts_P2[prompt : prompt + 1])[0]
            gradients_KD = gradients.output_gradients(policy, task.prompts_P2[prompt])
            laws = {"policy": policy_K, "prior": task.prior_PK[prompt]}
            return {
                name: gradients.measure(task, prompt, policy_K, gradients_KD, law_K, settings) for name, law_K in laws.items()
            }

        both = results.get({"world": world.name, "prompt": prompt, **settings}, measured)
        for proposal in PROPOSALS:
            found[proposal].append(both[proposal])
    return found


def _toy_table(settings: dict[str, Any], toys: dict) -> str:
    rows = []
    for (mu, n), methods in toys.items():
        for method, row in methods.items():
            exact = f"{toy.exact_variance(method, mu, n):.4f}" if method in ("dpg", "gdc++") else ""
            numbers = (f"{row[key]:.3f}" for key in ("bias", "squared_error", "signal_to_noise"))
            measured = f"{row['variance']:.4f} ± {row['variance_error']:.4f}"
            rows.append([f"{mu:g}", str(n), LABELS[method], measured, exact, *numbers])
    columns = ["mu", "n", "method", "variance ± standard error", "by integrals", "bias", "mean squared error", "mean² / variance"]
    return f"The toy, {settings['groups']:,} groups each:\n\n{table(columns, rows)}"


def _world_table(settings: dict[str, Any], proposal: str, prompts: list[dict[str, Any]]) -> str:
    rows = []
    signal = statistics.mean(prompt["signal"] for prompt in prompts)
    for n in settings["sizes"]:
        for method in gradients.SECTIONS:
            known = [prompt["methods"][f"{method}, {n}"] for prompt in prompts]
            means = {key: statistics.mean(row[key] for row in known) / signal for key in ("variance", "squared_bias", "squared_error")}
            exact = statistics.mean(p["exact"][method] / n for p in prompts) / signal if method in prompts[0]["exact"] else None
            snr = statistics.median(row["signal_to_noise"] for row in known)
            label = LABELS.get(method, "GDC++, Z of the group")
            rows.append([str(n), label, f"{means['variance']:.3f}", "" if exact is None else f"{exact:.3f}", f"{means['squared_bias']:.3f}", f"{means['squared_error']:.3f}", f"{snr:.3f}"])
    columns = ["n", "method", "variance", "by enumeration", "bias²", "mean squared error", "median signal-to-noise"]
    return (
        f"The exact world, {PROPOSALS[proposal]}: means over {len(prompts)} prompts, in units of the true gradient's mean "
        f"squared norm:\n\n{table(columns, rows)}"
    )


def _checks(settings: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for proposal, prompts in found.items():
        off = max(
            abs(p["methods"][f"{m}, {n}"]["variance"] * n / p["exact"][m] - 1) for p in prompts for m in ("dpg", "gdc++") for n in settings["sizes"]
        )
        lines.append(
            f"- {PROPOSALS[proposal]}: n times the variance of DPG and GDC++ is what enumeration gives at every n within "
            f"{off:.0%} on every prompt (the pool's error); BRAIn's longest estimate is {max(p['bound'] for p in prompts):.2f} of "
            "its bound, twice the longest gradient of its group's outputs."
        )
        for better, worse in (("brain", "gdc++"), ("gdc++", "dpg"), ("brain", "snis")):
            for n in settings["sizes"]:
                wins = sum(p["methods"][f"{better}, {n}"]["variance"] < p["methods"][f"{worse}, {n}"]["variance"] for p in prompts)
                sign = stats.binomtest(wins, len(prompts), alternative="greater").pvalue
                lines.append(f"- {PROPOSALS[proposal]}, n = {n}: variance of {LABELS[better]} below {LABELS[worse]} on {wins} of {len(prompts)} prompts (sign test: p = {sign:.3f}).")
    return "\n".join(lines)
