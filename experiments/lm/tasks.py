"""The tasks: prompts in disjoint sets, people's answers, a training reward and a gold scorer that does not share it.

``synopses`` is made of texts on this machine. ``scitldr`` and ``hh`` need data that a user names: the directory in the
environment variable DATA holds scitldr-a/{train,dev}.jsonl.gz (allenai/scitldr) and anthropic-hh/*.jsonl.gz
(anthropics/hh-rlhf).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from experiments.lm import scorers
from experiments.lm.cache import cached
from nemo_brain.data.package_synopses import INSTRUCTION, package_synopses
from nemo_brain.data.templates import render_chat
from nemo_brain.rewards.synopsis import SynopsisReward

SETS = ("train", "tuning", "heldout")
PAPER = INSTRUCTION.replace("this software package", "this paper")
Score = Callable[[Sequence[dict[str, Any]], Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Scorers:
    """What scores outputs.

    Attributes:
        reward, gold: of records and outputs [B]; higher is better.
        notes: numbers about them, for the page.
    """

    reward: Score
    gold: Score
    notes: dict[str, float]


@dataclass(frozen=True)
class Task:
    """Prompts and what scores their outputs.

    Attributes:
        length: the most tokens of an output.
        records: by set; each has ``messages``, ``reference`` (a person's answer) and what the scorers read.
        scorers: makes them, in minutes where they are fitted first.
    """

    name: str
    length: int
    records: dict[str, list[dict[str, Any]]]
    scorers: Callable[[], Scorers]

    def digest(self) -> str:
        """Names the prompts: runs on other prompts are other runs."""
        text = json.dumps([self.length, self.records], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def token_ids(self, tokenizer: PreTrainedTokenizerFast, chosen: str) -> list[list[int]]:
        return [render_chat(tokenizer, r["messages"], generation_prompt=True)[1] for r in self.records[chosen]]


def make_task(name: str, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int]) -> Task | None:
    """A task by name; None: its data is not given. ``sizes``: prompts of each set.

    Raises:
        ValueError: there are too few prompts.
    """
    task = {"synopses": _synopses, "scitldr": _scitldr, "hh": _dialogue}[name](tokenizer, sizes)
    for chosen in SETS:
        if task and len(task.records[chosen]) < sizes[chosen]:
            raise ValueError(f"{name}: {len(task.records[chosen])} prompts for {chosen}, {sizes[chosen]} are needed")
    return task


def _synopses(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int]) -> Task:
    train, heldout = package_synopses("train"), package_synopses("validation")
    sets = {
        "train": train[: sizes["train"]],
        "tuning": train[sizes["train"] :][: sizes["tuning"]],
        "heldout": heldout[: sizes["heldout"]],
    }
    records = {
        name: [_summary(r["prompt"], r["description"], r["reference"]) for r in rows] for name, rows in sets.items()
    }
    return Task("synopses", 20, records, _summary_scorers)


def _scitldr(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int]) -> Task | None:
    folder = _folder("scitldr-a")
    if folder is None:
        return None
    train, dev = ([_paper(row) for row in _rows(folder / f"{part}.jsonl.gz")] for part in ("train", "dev"))
    train, dev = [row for row in train if row], [row for row in dev if row]
    records = {
        "train": train[: sizes["train"]],
        "tuning": train[sizes["train"] :][: sizes["tuning"]],
        "heldout": dev[: sizes["heldout"]],
    }
    return Task("scitldr", 20, records, _summary_scorers)


def _paper(row: dict[str, Any], most: int = 60, least: int = 25) -> dict[str, Any] | None:
    """The first sentences of an abstract; None: they are too few words."""
    kept: list[str] = []
    for sentence in row["source"]:
        if len(" ".join([*kept, sentence]).split()) > most:
            break
        kept.append(sentence)
    text = " ".join(kept)
    return _summary(PAPER.format(description=text), text, row["target"][0]) if len(text.split()) >= least else None


def _summary(prompt: str, description: str, reference: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "description": description, "reference": reference}


def _summary_scorers() -> Scorers:
    reward = SynopsisReward()

    def score(records: Sequence[dict[str, Any]], outputs: Sequence[str]) -> torch.Tensor:
        prompts = [record["messages"][0]["content"] for record in records]
        found = reward(prompts, list(outputs), references=[None] * len(prompts), metadata=list(records))
        return torch.tensor(found, dtype=torch.float64)

    return Scorers(score, scorers.Similarity(scorers.e5()), {})


def _dialogue(
    tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int], length: int = 24, most: int = 110
) -> Task | None:
    """Short dialogues are prompts; the others' pairs teach the two scorers, a half each. Answers are cut to ``length``
    tokens for both, as outputs are."""
    folder = _folder("anthropic-hh")
    if folder is None:
        return None
    rows = [row for path in sorted(folder.glob("*.jsonl.gz")) for row in _rows(path)]
    random.Random(0).shuffle(rows)
    short: list[dict[str, Any]] = []
    pairs: list[tuple[str, str, str]] = []
    wanted = sum(sizes.values())
    for row in rows:
        (before, chosen), (same, rejected) = (row[key].rsplit("\n\nAssistant:", 1) for key in ("chosen", "rejected"))
        if before != same or not chosen.strip() or not rejected.strip():
            continue
        messages = _messages(before)
        if messages is None:
            continue
        chosen, rejected = (_cut(tokenizer, answer.strip(), length) for answer in (chosen, rejected))
        said = messages[-1]["content"]
        record = {"messages": messages, "reference": chosen, "said": said}
        if len(short) < wanted and len(render_chat(tokenizer, messages, generation_prompt=True)[1]) <= most:
            short.append(record)
        else:
            pairs.append((said, chosen, rejected))
    train, tuning = sizes["train"], sizes["train"] + sizes["tuning"]
    records = {"train": short[:train], "tuning": short[train:tuning], "heldout": short[tuning:]}
    return Task("hh", length, records, lambda: _preference_scorers(pairs))


def _preference_scorers(pairs: list[tuple[str, str, str]]) -> Scorers:
    """Fitted on two disjoint halves of the pairs, after a tenth that tests both."""
    tenth = len(pairs) // 10
    test, halves = pairs[:tenth], (pairs[tenth::2], pairs[tenth + 1 :: 2])
    encoders = scorers.minilm(), scorers.e5()

    def fit() -> dict[str, Any]:
        reward, gold = (scorers.Preference.fit(*both) for both in zip(encoders, halves, strict=True))
        notes = {"pairs": float(len(halves[0])), "test_pairs": float(tenth)}
        notes |= {"reward_accuracy": reward.accuracy(test), "gold_accuracy": gold.accuracy(test)}
        return {"weights": [reward.weights_D, gold.weights_D], "notes": notes}

    fitted = cached(f"preferences-{hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:8]}", fit)
    reward, gold = (scorers.Preference(*both) for both in zip(encoders, fitted["weights"], strict=True))
    return Scorers(reward, gold, fitted["notes"])


def _messages(dialogue: str) -> list[dict[str, str]] | None:
    """Turns in the roles' order; None: they are not in order."""
    messages = []
    for turn in dialogue.strip().split("\n\n"):
        role, _, content = turn.partition(": ")
        if role not in ("Human", "Assistant"):  # a further paragraph
            if not messages:
                return None
            messages[-1]["content"] += "\n\n" + turn
            continue
        if (role == "Human") != (len(messages) % 2 == 0) or not content.strip():
            return None
        messages.append({"role": "user" if role == "Human" else "assistant", "content": content.strip()})
    return messages if messages and messages[-1]["role"] == "user" else None


def _cut(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"][:length])


def _folder(name: str) -> Path | None:
    folder = Path(os.environ["DATA"]) / name if os.environ.get("DATA") else None
    return folder if folder and folder.is_dir() else None


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
