"""Outputs of one prompt, and their log-probs under a policy: one row that holds the prompt once and every output.

Shapes: N outputs, T tokens of an output, L tokens of the prompt, S positions of the row, P predicted tokens of all
outputs, U positions that predict (the prompt's last one, then every output's but its last), H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from experiments.lm.model import LanguageModel


@dataclass(frozen=True)
class Group:
    """A prompt's outputs, as they were sampled.

    Attributes:
        prompt: its place in its set.
        tokens_NT: the outputs, the end token included where they have one, then anything.
        counts_N: how many tokens count.
        prompt_LH, hidden_NTH: hidden states below the trained blocks, of the prompt and of the outputs' tokens.
        proposal_N, prior_N: log q' and log p of each output, float64.
        rewards_N: the training reward, float64.
    """

    prompt: int
    tokens_NT: torch.Tensor
    counts_N: torch.Tensor
    prompt_LH: torch.Tensor
    hidden_NTH: torch.Tensor
    proposal_N: torch.Tensor
    prior_N: torch.Tensor
    rewards_N: torch.Tensor

    def first(self, n: int) -> Group:
        """The group's first n outputs."""
        return self._slice(slice(0, n))

    def only(self, i: int) -> Group:
        """One output of the group."""
        return self._slice(slice(i, i + 1))

    def _slice(self, chosen: slice) -> Group:
        cut = {name: value[chosen] for name, value in vars(self).items() if name.split("_")[-1][0] == "N"}
        return replace(self, **cut)


def next_token_logprobs(model: LanguageModel, blocks: nn.ModuleList, group: Group) -> torch.Tensor:
    """The law of each token of each output [U, V]; ``places`` says where an output's tokens stand."""
    prompt, counts_N = len(group.prompt_LH), group.counts_N - 1
    owner_S = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N)
    token_S = torch.cat([torch.arange(int(count)) for count in counts_N])
    hidden_SH = torch.cat([group.prompt_LH, group.hidden_NTH[owner_S, token_S]])
    positions_S = torch.cat([torch.arange(prompt), prompt + token_S])
    owners_S = torch.cat([torch.full((prompt,), -1), owner_S])
    earlier_SS = positions_S[:, None] >= positions_S
    mask_SS = earlier_SS & ((owners_S == owners_S[:, None]) | (owners_S == -1))
    hidden_1SH = model.run(blocks, hidden_SH[None], positions_S[None], mask_SS[None])
    return model.logprobs(hidden_1SH[0, prompt - 1 :])


def places(group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each token that counts its place in U, its id and its output, [P] each."""
    counts_N = group.counts_N
    owner_P = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N)
    token_P = torch.cat([torch.arange(int(count)) for count in counts_N])
    before_N = (counts_N - 1).cumsum(0) - (counts_N - 1)  # tokens of earlier outputs that predict
    place_P = torch.where(token_P == 0, 0, before_N[owner_P] + token_P)
    return place_P, group.tokens_NT[owner_P, token_P], owner_P


def logprobs(model: LanguageModel, blocks: nn.ModuleList, group: Group) -> torch.Tensor:
    """log q(y|x) of each output [N], float64, with the blocks' gradient."""
    place_P, token_P, owner_P = places(group)
    each_P = next_token_logprobs(model, blocks, group)[place_P, token_P].double()
    return torch.zeros(len(group.counts_N), dtype=torch.float64).index_add(0, owner_P, each_P)


def kl(model: LanguageModel, blocks: nn.ModuleList, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over an output's positions of the exact KL(q, p) of the next token, and log q - log p, [N] each, float64.

    Over samples of q both have KL(q, p) of whole outputs as their mean; the first varies less.
    """
    place_P, token_P, owner_P = places(group)
    policy_UV = next_token_logprobs(model, blocks, group)
    prior_UV = next_token_logprobs(model, model.prior, group)
    kl_U = (policy_UV.exp() * (policy_UV - prior_UV)).sum(-1).double()
    ratio_P = (policy_UV[place_P, token_P] - prior_UV[place_P, token_P]).double()
    zero_N = torch.zeros(len(group.counts_N), dtype=torch.float64)
    return zero_N.index_add(0, owner_P, kl_U[place_P]), zero_N.index_add(0, owner_P, ratio_P)
