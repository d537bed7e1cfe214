"""The variance of the gradient estimates in the exact world, from the gradient of each output's log-prob.

With K_ij = g_i . g_j of a pool of outputs, every estimate sum_i c_i g_i of every method and group size has its products
from coefficients alone: c' K c. DPG and GDC++ with the known Z are means of independent terms, so their variances are
sums over all outputs. Shapes: P prompts, K all outputs, D weights of the policy, M the pool, G groups, N outputs per
group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call, grad, vmap

from experiments.gpt import COUNTS_KT, GPT, OUTPUTS, TOKENS_KT
from experiments.gram import products, spread
from experiments.training import objective_of
from experiments.world import Task

SECTIONS = {
    "dpg": {"name": "dpg", "z": "known"},
    "gdc++": {"name": "gdc++", "z": "known"},
    "gdc++ (group)": {"name": "gdc++", "z": "group"},
    "brain": {"name": "brain"},
    "snis": {"name": "snis"},
}


def output_gradients(policy: GPT, prompt_2: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """The gradient of log q(y|x) of every output y [K, D], float32."""
    weights = dict(policy.named_parameters())

    def logprob(weights: dict, tokens_T: torch.Tensor, counts_T: torch.Tensor) -> torch.Tensor:
        logprobs_TV = functional_call(policy, weights, (prompt_2[None], tokens_T[None, :-1]))[0]
        return (logprobs_TV.gather(-1, tokens_T[:, None]).squeeze(-1) * counts_T).sum()

    each = vmap(grad(logprob), in_dims=(None, 0, 0))
    parts = []
    for start in range(0, len(OUTPUTS), chunk):
        found = each(weights, TOKENS_KT[start : start + chunk], COUNTS_KT[start : start + chunk])
        parts.append(torch.cat([part.detach().flatten(1) for part in found.values()], 1))
    return torch.cat(parts)


def measure(
    task: Task, prompt: int, policy_K: torch.Tensor, gradients_KD: torch.Tensor, proposal_K: torch.Tensor, s: dict
) -> dict[str, Any]:
    """A prompt's estimates from one proposal: by method and group size the variance, the squared bias, the mean squared
    error and the signal-to-noise ratio; ``exact`` is n times the variance by enumeration; ``bound`` the largest
    |estimate| of BRAIn over twice the largest |g_i| of its group."""
    gamma = s["gamma"]
    target_K = task.posterior(gamma)[prompt]
    a_K, beta_K = (target_K - proposal_K).exp(), (policy_K - proposal_K).exp()
    true_D = target_K.exp() @ gradients_KD.double()  # of a step; the loss's is its negative
    signal = float(true_D @ true_D)
    squares_K = gradients_KD.double().square().sum(-1)
    exact = {
        "dpg": float(proposal_K.exp() @ (a_K.square() * squares_K)) - signal,
        "gdc++": float(proposal_K.exp() @ ((a_K - beta_K).square() * squares_K)) - signal,
    }
    generator = torch.Generator().manual_seed(1000 * s["seed"] + prompt)
    pool_M = torch.multinomial(proposal_K.exp(), s["pool"], replacement=True, generator=generator)
    pool_MD = gradients_KD[pool_M].double()
    gram_MM, along_M = pool_MD @ pool_MD.T, pool_MD @ true_D
    found: dict[str, Any] = {"signal": signal, "exact": exact, "bound": 0.0, "methods": {}}
    for n in s["sizes"]:
        places = [torch.randperm(s["pool"], generator=generator).view(-1, n) for _ in range(s["partitions"])]
        for name, section in SECTIONS.items():
            objective = objective_of(task, {**section, "gamma": gamma})
            totals = []
            for places_GN in places:
                outputs_GN = pool_M[places_GN]
                c_GN = -objective(
                    policy_K[outputs_GN],
                    prior_logprobs_GN=task.prior_PK[prompt][outputs_GN],
                    proposal_logprobs_GN=proposal_K[outputs_GN],
                    rewards_GN=task.rewards_PK[prompt][outputs_GN],
                    prompt_ids=[str(prompt)] * len(outputs_GN),
                ).coefficients_GN
                c_GM = spread(c_GN, places_GN, s["pool"])
                norms_G, mean_square = products(gram_MM, c_GM)
                totals.append([float(norms_G.mean()), mean_square, float((c_GM @ along_M).mean())])
                if name == "brain":
                    largest_G = squares_K[outputs_GN].amax(-1)
                    found["bound"] = max(found["bound"], float((norms_G / largest_G).sqrt().max() / 2))
            square, mean_square, along = torch.tensor(totals, dtype=torch.float64).mean(0).tolist()
            found["methods"][f"{name}, {n}"] = {
                "variance": square - mean_square,
                "signal_to_noise": mean_square / (square - mean_square),
                "squared_bias": mean_square - 2 * along + signal,
                "squared_error": square - 2 * along + signal,
            }
    return found
