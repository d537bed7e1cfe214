"""Prompt files: records of a prompt or of messages become ``Prompt`` objects, checked line by line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from nemo_brain.data.records import Record, Source, kind, read_records
from nemo_brain.data.templates import Template
from nemo_brain.groups import Prompt

ROLES = ("system", "user", "assistant")


@dataclass
class PromptSet:
    """Prompts, and how many of them were cut on the left to ``data.max_prompt_tokens``."""

    prompts: list[Prompt]
    truncated: int


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
        source: a JSONL file, a list of them, or an iterable of records. A record has ``prompt`` (text) or ``messages``
            (role and content each) and may have ``id`` and ``reference``. Other keys go to the prompt's metadata; so
            does, as ``messages``, what a template rendered (a plain prompt is one user message). An absent id is
            ``file stem:line number`` or ``key:index``.
        tokenizer: the model's tokenizer.
        template: None, ``"chat"`` or a format string: see ``Template``.
        max_prompt_tokens: longer prompts lose tokens on the left, behind the tokenizer's own start token.
        key: the configuration key that errors name.

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    truncated = 0
    for record in read_records(source, key):
        prompt, cut = parse_prompt(record, rendering, max_prompt_tokens)
        if prompt.id in places:
            raise record.error(
                f"the id {prompt.id!r} was used before, at {places[prompt.id]}", "give every prompt an id of its own"
            )
        places[prompt.id] = record.where
        prompts.append(prompt)
        truncated += cut
    return PromptSet(prompts, truncated)


def parse_prompt(record: Record, template: Template, max_prompt_tokens: int) -> tuple[Prompt, bool]:
    """The prompt of one record, and whether it was truncated."""
    prompt, messages = record.fields.get("prompt"), record.fields.get("messages")
    if (prompt is None) == (messages is None):
        both = "neither prompt nor messages" if prompt is None else "both prompt and messages"
        raise record.error(both, "give exactly one of them")
    own = ("id", "prompt", "messages", "reference")
    metadata = {name: value for name, value in record.fields.items() if name not in own}
    if prompt is not None:
        text = record.text("prompt", prompt)
        if not text:
            raise record.error("prompt is empty", "write a prompt or remove the line")
        if not template.identity:
            metadata["messages"] = [{"role": "user", "content": text}]
        render, argument = template.render_prompt, text
    else:
        render, argument = template.render_messages, _messages(record, messages)
        metadata["messages"] = argument
    try:
        text, start, ids = render(argument)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    if not ids:
        raise record.error("the prompt has no tokens", "write a prompt that the tokenizer keeps, or remove the line")
    room = max_prompt_tokens - len(start)
    if room < 1:
        raise ValueError(f"data.max_prompt_tokens={max_prompt_tokens} leaves no room for a prompt (raise it)")
    return Prompt(prompt_id(record), text, start + ids[-room:], prompt_reference(record), metadata), len(ids) > room


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


def _messages(record: Record, messages: object) -> list[dict[str, str]]:
    example = 'write [{"role": "user", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        raise record.error(f"messages is {kind(messages) if messages != [] else 'empty'}, not a list of them", example)
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise record.error(f"{name} does not have role and content, and these alone", example)
        if message["role"] not in ROLES:
            raise record.error(f"{name}.role is {message['role']!r}", f"use {', '.join(ROLES)}")
        record.text(f"{name}.content", message["content"])
    if messages[-1]["role"] == "assistant":
        raise record.error(
            "the last message is the assistant's", "end with the message to answer; move it to reference"
        )
    return messages


def split_holdout(prompts: Sequence[Prompt], holdout: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Splits prompts into training and held-out ones by a hash of (seed, id), whatever their order.

    Args:
        prompts: prompts with distinct ids.
        holdout: how many to hold out: an integer count, or a fraction below 1 (rounded, at least one prompt).
        seed: the run's seed.

    Raises:
        ValueError: ``data.holdout`` is no such number, or leaves nothing to train on.
    """
    whole = type(holdout) is int
    if not (whole and holdout > 0) and not (type(holdout) is float and 0 < holdout < 1):
        raise ValueError(f"data.holdout={holdout!r} (give a count of prompts, or a fraction between 0 and 1)")
    count = holdout if whole else max(1, round(holdout * len(prompts)))
    if count >= len(prompts):
        raise ValueError(
            f"data.holdout={holdout} leaves none of the {len(prompts)} prompts for training (lower it, or set "
            "data.validation)"
        )
    ranked = sorted((hashlib.sha256(f"{seed}/{prompt.id}".encode()).digest(), prompt.id) for prompt in prompts)
    held = {name for _, name in ranked[:count]}
    return [prompt for prompt in prompts if prompt.id not in held], [prompt for prompt in prompts if prompt.id in held]
