"""Outputs of a policy at temperature 1, from the model's whole law, with the draws' random numbers keyed by prompt.

Shapes: B prompts of a batch, N outputs of a prompt, T tokens of an output, L positions of a padded prompt, K keys so
far, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from experiments.lm.groups import Group
from experiments.lm.model import LanguageModel

BATCH = 128  # outputs


@dataclass(frozen=True)
class Prompts:
    """Prompts of one set with what the frozen blocks make of them, padded on the left.

    Attributes:
        places: in the set.
        lengths: tokens of each.
        seen_BL: bool, no padding.
        hidden_BLH: below the trained blocks.
        keys_values: of each frozen block.
    """

    places: list[int]
    lengths: list[int]
    seen_BL: torch.Tensor
    hidden_BLH: torch.Tensor
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def prefill(model: LanguageModel, prompts: Sequence[list[int]], n: int) -> list[Prompts]:
    """Batches of prompts (token ids) of similar length, for n outputs each."""
    order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, BATCH // n)
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        lengths = [len(prompts[i]) for i in chosen]
        pads = [max(lengths) - length for length in lengths]
        tokens_BL = torch.tensor([[0] * pad + prompts[i] for pad, i in zip(pads, chosen, strict=True)])
        pads_B1 = torch.tensor(pads)[:, None]
        seen_BL = torch.arange(max(lengths)) >= pads_B1
        cache = DynamicCache()
        hidden_BLH = model.below(tokens_BL, _positions(seen_BL), _causal(seen_BL), cache)
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        batches.append(Prompts(chosen, lengths, seen_BL, hidden_BLH, kept))
    return batches


@torch.no_grad()
def sample(
    model: LanguageModel, blocks: nn.ModuleList, batches: list[Prompts], n: int, length: int, end: int, seed: str
) -> list[Group]:
    """n outputs of each prompt with log q' [N], in the order of the set; prior and rewards are not filled in.

    Args:
        length: the most tokens of an output.
        end: the token that ends one.
        seed: names the draws; the same name gives all policies the same random numbers.
    """
    groups = [group for batch in batches for group in _batch(model, blocks, batch, n, length, end, seed)]
    return sorted(groups, key=lambda group: group.prompt)


def _batch(
    model: LanguageModel, blocks: nn.ModuleList, batch: Prompts, n: int, length: int, end: int, seed: str
) -> list[Group]:
    """As in ``groups``, a row holds a prompt once and its outputs' tokens side by side, n more with every step."""
    prompts = len(batch.places)
    uniform_BNT = torch.stack([_uniform(seed, place, n, length) for place in batch.places])
    cache = DynamicCache()
    for index, (keys, values) in enumerate(batch.keys_values):
        cache.update(keys, values, index)
    hidden_BLH = model.run(blocks, batch.hidden_BLH, _positions(batch.seen_BL), _causal(batch.seen_BL), cache)
    logprobs_BNV = model.logprobs(hidden_BLH[:, -1:]).expand(-1, n, -1)
    seen_BNK, own_BNN = batch.seen_BL[:, None].expand(-1, n, -1), torch.eye(n, dtype=torch.bool).expand(prompts, -1, -1)
    tokens, hidden = [], []
    counts_BN = torch.zeros(prompts, n, dtype=torch.int64)
    logprobs_BN = torch.zeros(prompts, n, dtype=torch.float64)
    going_BN = torch.ones(prompts, n, dtype=torch.bool)
    for t in range(length):
        cumulated_BNV = logprobs_BNV.double().exp().cumsum(-1)
        points_BN1 = uniform_BNT[:, :, t, None] * cumulated_BNV[..., -1:]
        # A point at the very end can exceed the last sum by rounding.
        token_BN1 = torch.searchsorted(cumulated_BNV, points_BN1, right=True).clamp(max=cumulated_BNV.shape[-1] - 1)
        tokens.append(token_BN1[..., 0])
        logprobs_BN += logprobs_BNV.gather(-1, token_BN1)[..., 0].double() * going_BN
        counts_BN += going_BN
        going_BN = going_BN & (tokens[-1] != end)
        if t == length - 1 or not going_BN.any():
            break
        positions_BN = (batch.seen_BL.sum(-1, keepdim=True) + t).expand(-1, n)
        seen_BNK = torch.cat([seen_BNK, own_BNN], -1)
        bottom_BNH = model.below(tokens[-1], positions_BN, seen_BNK, cache)
        hidden.append(bottom_BNH)
        logprobs_BNV = model.logprobs(model.run(blocks, bottom_BNH, positions_BN, seen_BNK, cache))
    tokens_BNT = torch.stack(tokens, -1)
    hidden_BNTH = torch.stack(hidden or [torch.zeros(prompts, n, hidden_BLH.shape[-1])], 2)
    unknown_N = torch.full((n,), torch.nan, dtype=torch.float64)
    groups = []
    for b, (place, prompt) in enumerate(zip(batch.places, batch.lengths, strict=True)):
        longest = int(counts_BN[b].max())
        groups.append(
            Group(
                prompt=place,
                tokens_NT=tokens_BNT[b, :, :longest].clone(),
                counts_N=counts_BN[b],
                prompt_LH=batch.hidden_BLH[b, -prompt:].clone(),
                hidden_NTH=hidden_BNTH[b, :, : max(longest - 1, 1)].clone(),
                proposal_N=logprobs_BN[b],
                prior_N=unknown_N,
                rewards_N=unknown_N,
            )
        )
    return groups


def _uniform(seed: str, place: int, n: int, length: int) -> torch.Tensor:
    """Random numbers of a prompt's outputs [N, T], float64; those of fewer outputs are the first."""
    digest = hashlib.sha256(f"{seed}:{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(n, length, generator=generator, dtype=torch.float64)


def _positions(seen_BL: torch.Tensor) -> torch.Tensor:
    return (seen_BL.cumsum(-1) - 1).clamp(min=0)


def _causal(seen_BL: torch.Tensor) -> torch.Tensor:
    """What each position sees [B, L, L]; padding sees itself, so that no row is empty."""
    length = seen_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal_LL & seen_BL[:, None]) | torch.eye(length, dtype=torch.bool)
