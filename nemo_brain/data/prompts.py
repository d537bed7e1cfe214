"""Prompt files: records of a prompt or of messages, checked line by line, become ``Prompt`` objects when they are asked
for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Prompt
from nemo_brain.data.conversations import OWN, read_prompt
from nemo_brain.data.records import Record, Source
from nemo_brain.data.stored import StoredRecords
from nemo_brain.data.templates import KEY, Template

# Prompts that are tokenised before a run begins: all of them, but of a file whose tokenising would take minutes.
TOKENISED_AT_ONCE = 10_000


@dataclass
class PromptSet:
    """Prompts. Of the first ones, ``tokenised`` in number, ``truncated`` were cut on the left to
    ``data.max_prompt_tokens``."""

    prompts: Prompts
    tokenised: int
    truncated: int


class Prompts(Sequence[Prompt]):
    """Prompts of checked records, rendered and tokenised each time that they are asked for.

    Args:
        records: the records of a source.
        template: how they are rendered.
        max_prompt_tokens: see ``load_prompts``.
        members: the records that are meant, by index; None: all of them.
    """

    def __init__(
        self,
        records: StoredRecords,
        template: Template,
        max_prompt_tokens: int,
        members: Sequence[int] | np.ndarray | None = None,
    ):
        self._records = records
        self._template = template
        self._max_prompt_tokens = max_prompt_tokens
        self._members = range(len(records)) if members is None else members

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Prompts: ...

    def __getitem__(self, index: int | slice) -> Prompt | Prompts:
        """One prompt, or a part of them. ValueError: the file has changed, or the tokenizer or the template refuses the
        record; names the file, and the line where there is one."""
        if isinstance(index, slice):
            return self._only(self._members[index])
        return parse_prompt(self._records[int(self._members[index])], self._template, self._max_prompt_tokens)

    def split(self, holdout: float, seed: int) -> tuple[Prompts, Prompts]:
        """Training and held-out prompts, see ``split_holdout``. Of all prompts of a source only."""
        assert self._members == range(len(self._records))
        train, held = split_holdout(map(prompt_id, self._records), holdout, seed)
        return self._only(train), self._only(held)

    def _only(self, members: Sequence[int] | np.ndarray) -> Prompts:
        return Prompts(self._records, self._template, self._max_prompt_tokens, members)


def load_prompts(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    max_prompt_tokens: int,
    key: str = "data.train",
) -> PromptSet:
    """Reads prompts.

    Args:
        source: a JSONL file, a list of them, or an iterable of records. A record has ``prompt`` (text or messages) or
            ``messages`` (role and content each) and may have ``system``, ``id`` and ``reference``; see
            ``conversations.read_prompt``. Other keys go to the prompt's metadata; so does, as ``messages``, what a
            template rendered (a plain prompt is one user message). An absent id is ``file stem:line number`` or
            ``key:index``.
        tokenizer: the model's tokenizer.
        template: None, ``"chat"`` or a format string: see ``Template``.
        max_prompt_tokens: longer prompts lose tokens on the left, behind the tokenizer's own start token.
        key: the configuration key that errors name.

    Every record is read and checked here. The first ``TOKENISED_AT_ONCE`` are also tokenised, so that a template that
    refuses messages is found out early; of others that is found when they are asked for.

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    records = StoredRecords(source, key, lambda record: check_prompt(record, rendering))
    prompts = Prompts(records, rendering, max_prompt_tokens)
    first = prompts[:TOKENISED_AT_ONCE]
    return PromptSet(prompts, len(first), sum(prompt.truncated for prompt in first))


def check_prompt(record: Record, template: Template) -> str:
    """Checks all of a prompt's record that needs no tokenizer, and returns its id.

    Raises:
        ValueError: naming the place, what is wrong and the remedy.
    """
    prompt = read_prompt(record, template.chat)
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            raise record.error(
                "the last message is the assistant's", "end with the message to answer; move it to reference"
            )
        if not template.chat:
            raise record.error("messages need a chat template", f"set {KEY}=chat, or give a plain prompt")
    prompt_reference(record)
    return prompt_id(record)


def parse_prompt(record: Record, template: Template, max_prompt_tokens: int) -> Prompt:
    """The prompt of one record. ValueError: as ``check_prompt``, or the template or the tokenizer refuses it."""
    name = check_prompt(record, template)
    prompt = read_prompt(record, template.chat)
    metadata = {name: value for name, value in record.fields.items() if name not in (*OWN, "id", "reference")}
    if isinstance(prompt, list):
        metadata["messages"] = prompt
    elif not template.identity:
        metadata["messages"] = [{"role": "user", "content": prompt}]
    try:
        if isinstance(prompt, list):
            text, start, ids = template.render_messages(prompt)
        else:
            text, start, ids = template.render_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    if not ids:
        raise record.error("the prompt has no tokens", "write a prompt that the tokenizer keeps, or remove the line")
    room = max_prompt_tokens - len(start)
    if room < 1:
        raise ValueError(f"data.max_prompt_tokens={max_prompt_tokens} leaves no room for a prompt (raise it)")
    kept = start + ids[-room:]
    return Prompt(name, text, kept, prompt_reference(record), metadata, truncated=len(ids) > room)


def prompt_id(record: Record) -> str:
    """The record's own id (a string or an integer), or its default one."""
    value = record.fields.get("id")
    if value is None:
        return record.default_id
    if type(value) is int:
        return str(value)
    if not record.text("id", value):
        raise record.error("id is empty", "write an id or leave it out")
    return value


def prompt_reference(record: Record) -> str | None:
    """The record's reference answer."""
    value = record.fields.get("reference")
    return None if value is None else record.text("reference", value)


def split_holdout(ids: Iterable[str], holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits items into training and held-out ones by a hash of (seed, id), whatever their order.

    Args:
        ids: the items' ids, distinct.
        holdout: how many to hold out: an integer count, or a fraction below 1 (rounded, at least one).
        seed: the run's seed.

    Returns:
        The indices of the training and of the held-out items, int64, each in order.

    Raises:
        ValueError: ``data.holdout`` is no such number, or leaves nothing to train on.
    """
    whole = type(holdout) is int
    if not (whole and holdout > 0) and not (type(holdout) is float and 0 < holdout < 1):
        raise ValueError(f"data.holdout={holdout!r} (give a count of prompts, or a fraction between 0 and 1)")
    keys = bytearray()
    for name in ids:
        keys += hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    ranked = np.argsort(np.frombuffer(keys, dtype=">u8"), kind="stable")
    count = holdout if whole else max(1, round(holdout * len(ranked)))
    if count >= len(ranked):
        raise ValueError(
            f"data.holdout={holdout} leaves none of the {len(ranked)} prompts for training (lower it, or set "
            "data.validation)"
        )
    return np.sort(ranked[count:]), np.sort(ranked[:count])
