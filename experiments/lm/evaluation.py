"""What a policy's outputs on prompts of a set say of it: reward, gold, KL to the prior, win-rate against people.

Shapes: P prompts, N outputs of a prompt.
"""

from __future__ import annotations

import torch
from torch import nn

from experiments.lm.groups import kl
from experiments.lm.world import World

EVALUATION = "evaluation"  # names the draws: the same random numbers for all policies


@torch.no_grad()
def evaluate(world: World, blocks: nn.ModuleList, chosen: str, n: int) -> dict[str, torch.Tensor]:
    """n outputs of each prompt of a set [P, N], float64.

    Returns:
        ``reward`` in the prior's units, ``gold``, ``win`` (1 where the gold score is above the person's answer's, 1/2
        at a tie), ``kl`` (the sum over positions of the next token's exact KL, nats), ``log_ratio`` (log q - log p:
        another estimate of the KL), ``tokens``.
    """
    records = world.task.records[chosen]
    groups = world.draw(blocks, chosen, range(len(records)), n, EVALUATION, prior=False)
    spread = [record for record in records for _ in range(n)]
    gold_PN = world.scorers.gold(spread, [text for group in groups for text in world.texts(group)]).view(-1, n)
    reference_P1 = world.scorers.gold(records, [record["reference"] for record in records])[:, None]
    found = {
        "reward": torch.stack([group.rewards_N for group in groups]),
        "gold": gold_PN,
        "win": (gold_PN > reference_P1).double() + 0.5 * (gold_PN == reference_P1).double(),
        "tokens": torch.stack([group.counts_N for group in groups]).double(),
    }
    if blocks is world.model.prior:
        return {**found, "kl": torch.zeros_like(gold_PN), "log_ratio": torch.zeros_like(gold_PN)}
    exact, ratios = zip(*(kl(world.model, blocks, group) for group in groups), strict=True)
    return {**found, "kl": torch.stack(exact), "log_ratio": torch.stack(ratios)}
