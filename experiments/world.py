"""The exact world: a prior, two rewards, and every quantity of a policy without sampling error.

Shapes: P prompts, K all outputs, T tokens of an output, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.gpt import END, GPT, LENGTH, LETTERS, OUTPUTS

SETTINGS = Path(__file__).with_name("world.yaml")


@dataclass(frozen=True)
class Task:
    """Some prompts with all that is known of their outputs: log p, the training reward and the gold reward [P, K]."""

    prompts_P2: torch.Tensor
    prior_PK: torch.Tensor
    rewards_PK: torch.Tensor
    gold_PK: torch.Tensor
    reference: int

    def log_z(self, gamma: float) -> torch.Tensor:
        """log E_p exp(r / gamma) [P]."""
        return (self.prior_PK + self.rewards_PK / gamma).logsumexp(-1)

    def posterior(self, gamma: float) -> torch.Tensor:
        """log of p exp(r / gamma) / Z [P, K]."""
        return (self.prior_PK + self.rewards_PK / gamma).log_softmax(-1)

    def win_rate(self, policy_PK: torch.Tensor) -> torch.Tensor:
        """P(gold of an output > gold of a reference) plus half of the ties [P].

        A reference is the best of ``reference`` outputs of the prior by gold, so its law is a power of the prior's.
        """
        gold_PK, order_PK = self.gold_PK.sort(-1)
        up_to_PK = self.prior_PK.gather(-1, order_PK).exp().cumsum(-1)
        below = torch.searchsorted(gold_PK, gold_PK)  # the first place of each gold reward; the last:
        last = torch.searchsorted(gold_PK, gold_PK, right=True) - 1
        not_above_PK = up_to_PK.gather(-1, last)
        below_PK = up_to_PK.gather(-1, (below - 1).clamp(min=0)).masked_fill(below == 0, 0.0)
        wins_PK = (below_PK**self.reference + not_above_PK**self.reference) / 2
        return (policy_PK.gather(-1, order_PK).exp() * wins_PK).sum(-1)

    def slack(self, policy_PK: torch.Tensor, gammas: list[float]) -> float:
        """The least of gamma log Z - (E_q r - gamma KL(q, p)) over prompts and gammas: never negative."""
        kl_P, reward_P = kl(policy_PK, self.prior_PK), expected(policy_PK, self.rewards_PK)
        return min(float((gamma * self.log_z(gamma) - reward_P + gamma * kl_P).min()) for gamma in gammas)


@dataclass(frozen=True)
class World:
    """The prior, the reported prompts' task, and another for tuning."""

    name: str
    prior: GPT
    reported: Task
    tuning: Task


def expected(policy_PK: torch.Tensor, values_PK: torch.Tensor) -> torch.Tensor:
    """E_q of values [P]."""
    return (policy_PK.exp() * values_PK).sum(-1)


def kl(one_PK: torch.Tensor, other_PK: torch.Tensor) -> torch.Tensor:
    """KL(one, other) in nats [P]."""
    return expected(one_PK, one_PK - other_PK)


def correlation(prior_PK: torch.Tensor, one_PK: torch.Tensor, other_PK: torch.Tensor) -> float:
    """Of two rewards, for the prior's outputs within a prompt."""
    one_PK, other_PK = (v - expected(prior_PK, v)[:, None] for v in (one_PK, other_PK))
    squares = (expected(prior_PK, v.square()).mean() for v in (one_PK, other_PK))
    return float(expected(prior_PK, one_PK * other_PK).mean() / torch.stack(list(squares)).prod().sqrt())


def make_world(settings: dict[str, Any] | None = None) -> World:
    """The world of ``world.yaml``, or of other settings. Its randomness is its own."""
    text = SETTINGS.read_text(encoding="utf-8")
    settings = settings or yaml.safe_load(text)
    name = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        prompts_P2 = torch.tensor(list(itertools.product(range(LETTERS), repeat=2)))[torch.randperm(LETTERS**2)]
        taste_VV = torch.randn(LETTERS, LETTERS, dtype=torch.float64)  # the training reward's error, by neighbours
        prior = GPT(settings["width"], settings["layers"], settings["heads"])
        _fine_tune(prior, prompts_P2, **settings["sft"])
    with torch.no_grad():
        prior_PK = prior.enumerate(prompts_P2)
    gold_PK = _standard(prior_PK, _gold(prompts_P2))
    error_K = torch.stack([sum((taste_VV[a, b] for a, b in itertools.pairwise(y)), torch.zeros(())) for y in OUTPUTS])
    error_PK = _standard(prior_PK, error_K.double().expand_as(gold_PK))
    rewards_PK = _standard(prior_PK, gold_PK + 0.75 * error_PK)
    count = settings["prompts"]
    tasks = [
        Task(prompts_P2[part], prior_PK[part], rewards_PK[part], gold_PK[part], settings["reference"])
        for part in (slice(count), slice(count, 2 * count))
    ]
    return World(name, prior, *tasks)


def _fine_tune(policy: GPT, prompts_P2: torch.Tensor, steps: int, batch: int, rate: float) -> None:
    """Maximum likelihood on demonstrations: a language that likes the prompt's first letter, the letter after the last
    one and repetitions, and ends sooner the longer an output is."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for _ in range(steps):
        rows_B2 = prompts_P2[torch.randint(len(prompts_P2), (batch,))]
        letters_BT, last_B, ended_B = torch.zeros(batch, LENGTH, dtype=torch.long), rows_B2[:, 1], torch.zeros(batch)
        counts_BT = torch.zeros(batch, LENGTH)
        for t in range(LENGTH):
            logits_BV = torch.zeros(batch, LETTERS + 1)
            logits_BV.scatter_add_(1, rows_B2[:, :1], torch.full((batch, 1), 1.5))
            logits_BV.scatter_add_(1, ((last_B + 1) % LETTERS)[:, None], torch.full((batch, 1), 1.2))
            logits_BV.scatter_add_(1, last_B[:, None], torch.full((batch, 1), 0.6))
            logits_BV[:, END] = t - 1.5
            drawn_B = torch.multinomial(logits_BV.softmax(-1), 1).squeeze(1)
            letters_BT[:, t], counts_BT[:, t] = drawn_B, 1 - ended_B
            ended_B = torch.maximum(ended_B, (drawn_B == END).float())
            last_B = drawn_B.clamp(max=LETTERS - 1)
        logprobs_BTV = policy(rows_B2, letters_BT[:, :-1])
        nats_BT = -logprobs_BTV.gather(-1, letters_BT[..., None]).squeeze(-1)
        loss = (nats_BT * counts_BT).sum() / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _gold(prompts_P2: torch.Tensor) -> torch.Tensor:
    """What is wanted: different letters, the prompt's second letter among them, an end, a palindrome best of all."""
    wanted = [len(set(y)) + 2.0 * (len(y) > 2 and y == y[::-1]) + (len(y) < LENGTH) for y in OUTPUTS]
    there_PK = torch.tensor([[float(b in y) for y in OUTPUTS] for b in prompts_P2[:, 1].tolist()])
    return (torch.tensor(wanted) + there_PK).double()


def _standard(prior_PK: torch.Tensor, values_PK: torch.Tensor) -> torch.Tensor:
    """Mean 0 and, within a prompt, variance 1 for the prior's outputs."""
    values_PK = values_PK - expected(prior_PK, values_PK).mean()
    within = expected(prior_PK, values_PK.square()) - expected(prior_PK, values_PK).square()
    return values_PK / within.mean().sqrt()
