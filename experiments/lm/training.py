"""Algorithm 1 on the language model: the package's objectives on groups, Adam on the last blocks.

Shapes: G groups, N outputs of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from experiments.lm.groups import Group, logprobs
from experiments.lm.world import World
from nemo_brain.objectives import make_objective

PROMPTS = 8  # of a step
CLIP = 1.0  # of the gradient's norm


def train(world: World, run: dict[str, Any]) -> tuple[nn.ModuleList, list[dict[str, float]]]:
    """The trained blocks, and the loss and gradient norm of each step.

    Args:
        run: ``objective`` (its section), ``refresh`` (always: every iteration samples from the policy; never: samples
            of the prior alone), ``n``, ``draws`` (outputs of a prompt in a step, in groups of n),
            ``prompts_per_iteration``, ``passes`` (of an iteration over its outputs), ``rate``, ``seed`` (of the
            prompts' order and of refreshed samples).
    """
    objective = make_objective(**run["objective"])
    policy = world.model.policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run["rate"], betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(run["seed"])
    order, size = torch.randperm(len(world.rollouts), generator=generator).tolist(), run["prompts_per_iteration"]
    history = []
    for first in range(0, len(order) - size + 1, size):
        chosen = order[first : first + size]
        if first and run["refresh"] == "always":
            drawn = world.draw(policy, "train", sorted(chosen), run["draws"], f"{run['seed']}:{first}")
            groups = {group.prompt: group for group in drawn}
        else:
            groups = {place: world.rollouts[place].first(run["draws"]) for place in chosen}
        passes = run["passes"] * chosen
        for start in range(0, len(passes), PROMPTS):
            batch = [groups[place] for place in passes[start : start + PROMPTS]]
            logprobs_GN = torch.stack([logprobs(world.model, policy, group) for group in batch]).view(-1, run["n"])
            output = objective(logprobs_GN, **scores(batch, run["n"]))
            loss = output.loss_G.mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            optimizer.step()
            objective.advance(logprobs_GN.detach(), **scores(batch, run["n"]))
            history.append({"loss": float(loss.detach()), "norm": float(norm), "ess": float(output.ess_alpha_G.mean())})
    return policy, history


def scores(batch: list[Group], n: int) -> dict[str, Any]:
    """What an objective needs besides log q: each prompt's outputs in groups of n."""
    names = {"prior_logprobs_GN": "prior_N", "proposal_logprobs_GN": "proposal_N", "rewards_GN": "rewards_N"}
    found: dict[str, Any] = {
        name: torch.stack([getattr(group, field) for group in batch]).view(-1, n) for name, field in names.items()
    }
    ids = [str(group.prompt) for group in batch for _ in range(len(group.counts_N) // n)]
    return {**found, "prompt_ids": ids}
