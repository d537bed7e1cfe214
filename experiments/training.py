"""Algorithm 1 in the exact world: the package's objectives, sampling from enumerated laws, plain Adam.

Shapes: P prompts, M draws of a prompt in a step, C optimizer steps of an iteration, G groups, N outputs per group,
K all outputs.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from experiments.gpt import GPT
from experiments.known_z import objective_with
from experiments.world import Task, World, expected, kl
from nemo_brain.objectives import Objective

DRAWS = 16  # uniform numbers of a prompt in a step; a run that uses fewer outputs uses the first
BOUND = 1e-9  # float64 sums over 2,801 outputs


def train(world: World, run: dict[str, Any], bound_gammas: list[float]) -> tuple[list[dict[str, float]], GPT]:
    """The checkpoints of a run, one an iteration and the start, and the policy that it ends with.

    Args:
        run: ``objective`` (its section), ``refresh`` (always, never), ``n``, ``draws`` (outputs of a prompt in a step,
            in groups of n), ``steps``, ``steps_per_iteration``, ``rate``, ``seed``, ``prompts`` (reported, tuning).
        bound_gammas: at every checkpoint E_q r - gamma KL(q, p) <= gamma log Z for these, or RuntimeError.
    """
    task: Task = getattr(world, run["prompts"])
    objective = objective_of(task, run["objective"])
    policy = copy.deepcopy(world.prior)
    optimizer = torch.optim.Adam(policy.parameters(), lr=run["rate"])
    gamma = run["objective"].get("gamma")
    checkpoints = [_checkpoint(task, task.prior_PK, 0, gamma, bound_gammas)]
    policy_PK = task.prior_PK
    for iteration in range(run["steps"] // run["steps_per_iteration"]):
        proposal_PK = policy_PK if run["refresh"] == "always" else task.prior_PK
        outputs_CPM = sample(proposal_PK, run["steps_per_iteration"], run["draws"], run["seed"], iteration)
        for outputs_PM in outputs_CPM:
            _step(policy, optimizer, objective, task, proposal_PK, outputs_PM, run["n"])
        with torch.no_grad():
            policy_PK = policy.enumerate(task.prompts_P2)
        step = (iteration + 1) * run["steps_per_iteration"]
        checkpoints.append(_checkpoint(task, policy_PK, step, gamma, bound_gammas))
    return checkpoints, policy


def objective_of(task: Task, section: dict[str, Any]) -> Objective:
    """The objective of a section; a known Z is what enumeration gives."""
    log_z = task.log_z(section["gamma"]).tolist() if section.get("z") == "known" else []
    return objective_with(section, {str(p): value for p, value in enumerate(log_z)})


def sample(law_PK: torch.Tensor, steps: int, draws: int, seed: int, iteration: int) -> torch.Tensor:
    """Places of outputs [C, P, M], exactly from the law. The first draws are the same whatever ``draws`` is."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + iteration)
    uniform_CPM = torch.rand(steps, len(law_PK), DRAWS, generator=generator, dtype=torch.float64)[..., :draws]
    cumulated_PK = law_PK.exp().cumsum(-1)
    points_PM = uniform_CPM.transpose(0, 1).reshape(len(law_PK), -1) * cumulated_PK[:, -1:]
    places_PM = torch.searchsorted(cumulated_PK, points_PM, right=True).clamp(max=law_PK.shape[1] - 1)
    return places_PM.view(len(law_PK), steps, draws).transpose(0, 1)


def groups_of(task: Task, outputs_PM: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's prompt [G] and outputs [G, N]."""
    outputs_GN = outputs_PM.reshape(-1, n)
    return torch.arange(len(task.prompts_P2)).repeat_interleave(outputs_PM.shape[1] // n), outputs_GN


def _step(
    policy: GPT,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    task: Task,
    proposal_PK: torch.Tensor,
    outputs_PM: torch.Tensor,
    n: int,
) -> None:
    prompt_G, outputs_GN = groups_of(task, outputs_PM, n)
    rows_GN = prompt_G[:, None].expand_as(outputs_GN)
    policy_B = policy.logprobs(task.prompts_P2[rows_GN.reshape(-1)], outputs_GN.reshape(-1))
    scores = {
        "prior_logprobs_GN": task.prior_PK[rows_GN, outputs_GN],
        "proposal_logprobs_GN": proposal_PK[rows_GN, outputs_GN],
        "rewards_GN": task.rewards_PK[rows_GN, outputs_GN],
        "prompt_ids": [str(p) for p in prompt_G.tolist()],
    }
    loss = objective(policy_B.view(outputs_GN.shape), **scores).loss_G.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    objective.advance(policy_B.detach().view(outputs_GN.shape), **scores)


def _checkpoint(
    task: Task, policy_PK: torch.Tensor, step: int, gamma: float | None, bound_gammas: list[float]
) -> dict[str, float]:
    """What enumeration says of a policy, on average over prompts: KL in nats, rewards in the prior's deviations."""
    slack = task.slack(policy_PK, bound_gammas)
    if slack < -BOUND or not math.isfinite(slack):
        raise RuntimeError(f"E_q r - gamma KL(q, p) exceeds gamma log Z by {-slack} at step {step}")
    values = {
        "kl": kl(policy_PK, task.prior_PK),
        "reward": expected(policy_PK, task.rewards_PK),
        "gold": expected(policy_PK, task.gold_PK),
        "win_rate": task.win_rate(policy_PK),
    }
    if gamma is not None:
        target_PK = task.posterior(gamma)
        values["kl_posterior_policy"] = kl(target_PK, policy_PK)
        # gamma KL(q, posterior) = gamma log Z - (E_q r - gamma KL(q, p))
        values["regret"] = gamma * kl(policy_PK, target_PK)
    return {"step": step, "slack": slack} | {name: float(value_P.mean()) for name, value_P in values.items()}
