"""The model, the tasks and the prior's rollouts, as every run of these figures sees them.

Shapes: N outputs of a prompt.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerFast

from experiments.lm.cache import cached
from experiments.lm.groups import Group, logprobs
from experiments.lm.model import LanguageModel, smollm
from experiments.lm.sampling import Prompts, prefill, sample
from experiments.lm.tasks import Task, make_task

SETTINGS = Path(__file__).parent / "settings.yaml"


class World:
    """One task with its model.

    Attributes:
        name: as ``world_name``.
        mean, unit: of the training reward under the prior, on the training prompts: its mean, and the root of its mean
            variance within a prompt. Rewards count in these units from there.
    """

    def __init__(self, name: str, model: LanguageModel, tokenizer: PreTrainedTokenizerFast, task: Task, outputs: int):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.name, self.scorers = name, task.scorers()
        self._ids = {chosen: task.token_ids(tokenizer, chosen) for chosen in task.records}
        self._prefilled: dict[tuple[str, int, int], list[Prompts]] = {}
        self.mean, self.unit = 0.0, 1.0
        everything = range(len(task.records["train"]))
        # Scored before the unit is known.
        groups = cached(f"rollouts-{self.name}", lambda: self.draw(model.prior, "train", everything, outputs, "file"))
        rewards_PN = torch.stack([group.rewards_N for group in groups])
        self.mean, self.unit = float(rewards_PN.mean()), float(rewards_PN.var(-1).mean().sqrt())
        self.rollouts = [replace(group, rewards_N=self._in_units(group.rewards_N)) for group in groups]

    def draw(
        self, blocks: nn.ModuleList, chosen: str, places: Sequence[int], n: int, seed: str, prior: bool = True
    ) -> list[Group]:
        """n scored outputs of a policy for some prompts of a set; with ``prior`` their log p."""
        key = (chosen, n, hash(tuple(places)))
        if key not in self._prefilled:
            self._prefilled[key] = prefill(self.model, [self._ids[chosen][place] for place in places], n)
        end = self.tokenizer.eos_token_id
        named = f"{self.name}:{chosen}:{seed}"
        groups = sample(self.model, blocks, self._prefilled[key], n, self.task.length, end, named)
        groups = [replace(group, prompt=places[group.prompt]) for group in groups]
        texts = [text for group in groups for text in self.texts(group)]
        records = [self.task.records[chosen][group.prompt] for group in groups for _ in range(n)]
        rewards_PN = self._in_units(self.scorers.reward(records, texts)).view(-1, n)
        scored = [replace(group, rewards_N=rewards_N) for group, rewards_N in zip(groups, rewards_PN, strict=True)]
        if blocks is self.model.prior:
            return [replace(group, prior_N=group.proposal_N) for group in scored]
        if not prior:
            return scored
        with torch.no_grad():
            return [replace(group, prior_N=logprobs(self.model, self.model.prior, group)) for group in scored]

    def texts(self, group: Group) -> list[str]:
        pairs = zip(group.tokens_NT.tolist(), group.counts_N.tolist(), strict=True)
        return [self.tokenizer.decode(tokens[:count], skip_special_tokens=True) for tokens, count in pairs]

    def _in_units(self, rewards: torch.Tensor) -> torch.Tensor:
        return (rewards - self.mean) / self.unit


@functools.cache
def settings() -> dict[str, Any]:
    return yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))


@functools.cache
def _model() -> tuple[LanguageModel, PreTrainedTokenizerFast]:
    return smollm(settings()["world"]["trained_blocks"])


def world_name(task: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Names a task's prompts and the world's settings: part of every run's settings. None: its data is not given."""
    world = settings()["world"]
    made = make_task(task, tokenizer, world["prompts"])
    if made is None:
        return None
    everything = json.dumps([made.digest(), world["trained_blocks"], world["outputs"]])
    return f"{task}-{hashlib.sha256(everything.encode()).hexdigest()[:8]}"


@functools.lru_cache(maxsize=1)  # hidden states of prompts take a gigabyte
def make_world(task: str) -> World:
    """The world of a task. ValueError: its data is not given."""
    model, tokenizer = _model()
    name, made = world_name(task, tokenizer), make_task(task, tokenizer, settings()["world"]["prompts"])
    if name is None or made is None:
        raise ValueError(f"{task}: DATA does not name a directory that holds its data")
    return World(name, model, tokenizer, made, settings()["world"]["outputs"])
