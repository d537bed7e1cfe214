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
TABLED = (0.0, 0.5, 1.0)  # means of the toy's proposal that the page's table has
ORDER = (("brain", "gdc++"), ("gdc++", "dpg"), ("brain", "snis"))
PROPOSALS = {"policy": "q' = q", "prior": "q' = p"}


def make(world: World, settings: dict[str, Any], results: Results) -> tuple[Figure, str]:
    toys = _toys(settings["toy"], results)
    found = _world(world, settings["world"], results)
    made, (left, middle, right) = plots.figure(3, width=3.6)
    means = settings["toy"]["means"]
    for method, label in LABELS.items():
        rows, look = [toys[mu, 8][method] for mu in means], {"color": plots.COLOURS[method], "markersize": 3}
        left.plot(means, [row["variance"] for row in rows], "o-", label=label, **look)
        middle.plot(means, [row["signal_to_noise"] for row in rows], "o-", **look)
        variances = [moments(prompt, method, 8)["variance"] for prompt in found["policy"]]
        right.plot(range(1, len(variances) + 1), variances, "o", **look)
    left.set_title("toy, n = 8: variance")
    middle.set_title("toy, n = 8: mean² / variance")
    right.set_title("exact world, q' = q, n = 8: variance")
    for axes in (left, middle):
        axes.set_xlabel("mean of the proposal")
    left.set_yscale("log")
    left.legend(loc="upper left")
    right.set_yscale("log")
    right.set_xlabel("prompt")
    sizes = settings["world"]["sizes"]
    tables = [_world_table(sizes, proposal, prompts) for proposal, prompts in found.items()]
    return made, "\n\n".join([_toy_table(settings["toy"], toys), *tables, _checks(sizes, found)])


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
            given = (task, prompt, policy_K, gradients_KD)
            return {name: gradients.measure(*given, law_K, settings) for name, law_K in laws.items()}

        both = results.get({"world": world.name, "prompt": prompt, **settings}, measured)
        for proposal in PROPOSALS:
            found[proposal].append(both[proposal])
    return found


def _toy_table(settings: dict[str, Any], toys: dict) -> str:
    rows = []
    for (mu, n), methods in toys.items():
        for method, row in methods.items() if mu in TABLED else ():
            exact = f"{toy.exact_variance(method, mu, n):.4f}" if method in ("dpg", "gdc++") else ""
            numbers = (f"{row[key]:.3f}" for key in ("bias", "squared_error", "signal_to_noise"))
            measured = f"{row['variance']:.4f} ± {row['variance_error']:.4f}"
            rows.append([f"{mu:g}", str(n), LABELS[method], measured, exact, *numbers])
    columns = ["mu", "n", "method", "variance ± standard error", "by integrals"]
    columns += ["bias", "mean squared error", "mean² / variance"]
    return f"The toy, {settings['groups']:,} groups each:\n\n{table(columns, rows)}"


def moments(prompt: dict[str, Any], method: str, n: int) -> dict[str, float]:
    """A method's moments on a prompt: by enumeration where that is possible, where the estimate has no bias."""
    if method not in prompt["exact"]:
        return prompt["methods"][f"{method}, {n}"]
    variance = prompt["exact"][method] / n
    return {
        "variance": variance,
        "squared_bias": 0.0,
        "squared_error": variance,
        "signal_to_noise": prompt["signal"] / variance,
    }


def _world_table(sizes: list[int], proposal: str, prompts: list[dict[str, Any]]) -> str:
    rows = []
    signal = statistics.mean(prompt["signal"] for prompt in prompts)
    for n in sizes:
        for method in gradients.SECTIONS:
            known = [moments(prompt, method, n) for prompt in prompts]
            row = [str(n), LABELS.get(method, "GDC++, Z of the group")]
            for key in ("variance", "squared_bias", "squared_error"):
                row.append(f"{statistics.mean(one[key] for one in known) / signal:.3f}")
            rows.append([*row, f"{statistics.median(one['signal_to_noise'] for one in known):.3f}"])
    columns = ["n", "method", "variance", "bias²", "mean squared error", "median of mean² / variance"]
    return (
        f"The exact world, {PROPOSALS[proposal]}: means over {len(prompts)} prompts, in units of the true gradient's "
        f"mean squared norm:\n\n{table(columns, rows)}"
    )


def _checks(sizes: list[int], found: dict[str, list[dict[str, Any]]]) -> str:
    lines, rows = [], []
    for proposal, prompts in found.items():
        # n times the variance by the pool, at every n.
        pooled = [[n * p["methods"][f"dpg, {n}"]["variance"] for n in sizes] for p in prompts]
        moved = max(max(values) / min(values) - 1 for values in pooled)
        off = [values[0] / prompt["exact"]["dpg"] for values, prompt in zip(pooled, prompts, strict=True)]
        bound = max(prompt["bound"] for prompt in prompts)
        lines.append(
            f"- {PROPOSALS[proposal]}: n times DPG's variance, which does not depend on n, differs between n by at "
            f"most {moved:.0%} in the U-statistics. They are {min(off):.2f} to {max(off):.2f} times what enumeration "
            f"gives. BRAIn's longest estimate is {bound:.2f} of its bound, twice the longest gradient in its group."
        )
        for better, worse in ORDER:
            row = [PROPOSALS[proposal], f"{LABELS[better]} below {LABELS[worse]}"]
            for n in sizes:
                pairs = [[moments(prompt, method, n)["variance"] for method in (better, worse)] for prompt in prompts]
                wins = sum(low < high for low, high in pairs)
                sign = stats.binomtest(wins, len(prompts), alternative="greater").pvalue
                row.append(f"{wins} of {len(prompts)} (p = {sign:.3f})")
            rows.append(row)
    columns = ["proposal", "variance of", *(f"n = {n}" for n in sizes)]
    return "\n".join([*lines, "", "On how many prompts (one-sided sign test):", "", table(columns, rows)])
