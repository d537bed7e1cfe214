"""The variance of the gradient estimates on the language model, from the gradient of each output's log-prob.

The gradient is that of the last block's weights. Each output's is computed once; every estimate of every method and
group size has its products from coefficients and the outputs' Gram matrix. Shapes: M the pool, G groups, N outputs of a
group, D weights of the last block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from experiments.gradients import SECTIONS
from experiments.gram import products, spread
from experiments.known_z import objective_with
from experiments.lm.groups import Group, logprobs
from experiments.lm.training import scores, train
from experiments.lm.world import World

EXACT = 1e-9  # coefficients and norms are float64
FACT_1 = ("brain", "gdc++ (group)")


def measure(world: World, run: dict[str, Any]) -> dict[str, Any]:
    """The held-out prompts' moments with one proposal.

    Args:
        run: ``policy`` (a run of ``training``), ``proposal`` (policy or prior), ``gamma``, ``pool`` (outputs of a
            prompt), ``normaliser`` (further outputs of the prior, whose mean of exp(r / gamma) is Z), ``sizes``,
            ``partitions`` (of the pool into groups), ``prompts``, ``seed``.

    Raises:
        RuntimeError: an estimate of BRAIn exceeds its bound, or GDC++ with the group's Z differs from BRAIn at q' = q.
    """
    policy, _ = train(world, run["policy"])
    places, pool = range(run["prompts"]), run["pool"]
    blocks = policy if run["proposal"] == "policy" else world.model.prior
    named = f"variance:{run['seed']}"
    others = world.draw(world.model.prior, "heldout", places, run["normaliser"], f"{named}:z")
    groups = world.draw(blocks, "heldout", places, pool, named)
    found = []
    for group, other in zip(groups, others, strict=True):
        log_z = float((other.rewards_N / run["gamma"]).logsumexp(0) - math.log(run["normaliser"]))
        gradients_MD, policy_M = output_gradients(world, policy, group)
        gram_MM = (gradients_MD @ gradients_MD.T).double()
        found.append(moments(group, policy_M, gram_MM, log_z, run))
    return {"prompts": found}


def output_gradients(world: World, policy: nn.ModuleList, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of each output's log q with respect to the last block [M, D], and log q [M]."""
    policy.requires_grad_(False)
    weights = list(policy[-1].requires_grad_(True).parameters())
    gradients, values = [], []
    for i in range(len(group.counts_N)):
        logprob_1 = logprobs(world.model, policy, group.only(i))
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(logprob_1.sum(), weights)]))
        values.append(logprob_1.detach())
    return torch.stack(gradients), torch.cat(values)


def moments(
    group: Group, policy_M: torch.Tensor, gram_MM: torch.Tensor, log_z: float, run: dict[str, Any]
) -> dict[str, Any]:
    """A prompt's estimates: by method and group size the variance and |mean|^2; ``bound`` the largest |estimate| of
    BRAIn over its bound, twice the largest |g_i| of its group; ``ess`` of the pool's weights alpha."""
    generator = torch.Generator().manual_seed(run["seed"])
    squares_M, pool = gram_MM.diagonal(), len(policy_M)
    name = str(group.prompt)
    scored = {key: value for key, value in scores([group], pool).items() if key != "prompt_ids"}
    if run["proposal"] == "policy":
        # log q' as the gradients' forward pass has it: sampling differs from it in float32's last digits.
        scored["proposal_logprobs_GN"] = policy_M[None]
    found: dict[str, Any] = {"bound": 0.0, "methods": {}}
    for n in run["sizes"]:
        partitions = [torch.randperm(pool, generator=generator).view(-1, n) for _ in range(run["partitions"])]
        totals: dict[str, list[list[float]]] = {}
        for places_GN in partitions:
            chosen = {key: value[0][places_GN] for key, value in scored.items()}
            rows = {}
            for method, section in SECTIONS.items():
                objective = objective_with({**section, "gamma": run["gamma"]}, {name: log_z})
                output = objective(policy_M[places_GN], **chosen, prompt_ids=[name] * len(places_GN))
                rows[method] = spread(-output.coefficients_GN, places_GN, pool)
                norms_G, mean_square = products(gram_MM, rows[method])
                totals.setdefault(method, []).append([float(norms_G.mean()), mean_square])
                if method == "brain":
                    ratio_G = (norms_G / squares_M[places_GN].amax(-1)).clamp(min=0.0).sqrt() / 2
                    found["bound"] = max(found["bound"], float(ratio_G.max()))
            difference = float((rows[FACT_1[0]] - rows[FACT_1[1]]).abs().max())
            if run["proposal"] == "policy" and difference > EXACT:
                raise RuntimeError(f"GDC++ with the group's Z differs from BRAIn at q' = q by {difference}")
        for method, pairs in totals.items():
            square, mean_square = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
            found["methods"][f"{method}, {n}"] = {"variance": square - mean_square, "mean_square": mean_square}
    if found["bound"] > 1 + EXACT:
        raise RuntimeError(f"an estimate of BRAIn is {found['bound']} times its bound")
    log_alpha_M = group.prior_N + group.rewards_N / run["gamma"] - scored["proposal_logprobs_GN"][0]
    found["ess"] = float(1 / log_alpha_M.softmax(0).square().sum())
    return found
