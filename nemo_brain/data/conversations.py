"""Prompts as people's files have them: text, messages, hh-rlhf's transcripts, with a system prompt beside them."""

from __future__ import annotations

import re
from typing import Any

from nemo_brain.data.records import Record, kind

ROLES = ("system", "user", "assistant")
OWN = ("prompt", "messages", "system")  # keys of a record that say what the prompt is
TURN = re.compile(r"\n\n(Human|Assistant):")  # of a transcript
_TRANSCRIPT = re.compile(r"\n\nHuman:|\s*Human:(?=.*\n\nAssistant:)", re.DOTALL)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

Conversation = list[dict[str, str]]


def parse_messages(record: Record, name: str, messages: object) -> Conversation:
    """``messages``, which must be a non-empty list of them, with their roles and contents alone.

    What is null beside them is not there: ``datasets`` gives every message the keys of all. ``name``: the key that
    errors name.
    """
    example = 'write [{"role": "user", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        raise record.error(f"{name} is {kind(messages) if messages != [] else 'empty'}, not a list of them", example)
    for index, message in enumerate(messages):
        keys = message if isinstance(message, dict) else {}
        others = sorted(key for key, value in keys.items() if value is not None and key not in ("role", "content"))
        if not {"role", "content"} <= set(keys) or others:
            found = f", but {', '.join(others)}" if others else ""
            raise record.error(f"{name}[{index}] does not have role and content, and these alone{found}", example)
        if message["role"] not in ROLES:
            raise record.error(f"{name}[{index}].role is {message['role']!r}", f"use {', '.join(ROLES)}")
        record.text(f"{name}[{index}].content", message["content"])
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def read_prompt(record: Record, chat: bool) -> str | Conversation:
    """The prompt of a record: ``prompt``, text or messages, or ``messages``; a ``system`` prompt is its first message.

    Beside ``messages`` a text ``prompt`` must be one that they repeat: it is then what is to be answered, and what
    follows is left out (as of UltraChat's records).

    Args:
        chat: there is a chat template: a transcript becomes the messages that it consists of.

    Raises:
        ValueError: naming the place, what is wrong and the remedy.
    """
    prompt: Any = record.fields.get("prompt")
    messages: Any = record.fields.get("messages")
    if prompt is None and messages is None:
        raise record.error("neither prompt nor messages", f"give exactly one of them{columns(record)}")
    if messages is None and isinstance(prompt, list):
        messages = parse_messages(record, "prompt", prompt)
    elif messages is not None:
        messages = parse_messages(record, "messages", messages)
        if prompt is not None:
            place = index_of(messages, record.text("prompt", prompt))
            if place is None:
                raise record.error("both prompt and messages", "give exactly one of them, or messages that repeat it")
            messages = messages[: place + 1] if place else None
    elif not record.text("prompt", prompt):
        raise record.error("prompt is empty", "write a prompt or remove the line")
    return with_system(record, prompt if messages is None else messages, chat)


def with_system(record: Record, prompt: str | Conversation, chat: bool) -> str | Conversation:
    """The prompt with the record's ``system`` prompt before it; ``chat``, errors as in ``read_prompt``."""
    if chat and isinstance(prompt, str) and is_transcript(prompt):
        prompt = transcript_messages(prompt)
    system = record.fields.get("system")
    if system is None or not record.text("system", system).strip():
        return prompt
    if not chat:
        raise record.error(
            "a system prompt needs a chat template", "set data.template=chat, or leave system out, or rename it"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise record.error("system differs from the system message", "keep one of them")
    return messages


def index_of(messages: Conversation, prompt: str) -> int | None:
    """The first of the user's messages that says ``prompt``; None: there is none."""
    wanted = {"role": "user", "content": prompt.strip()}
    found = ({**message, "content": message["content"].strip()} for message in messages)
    return next((index for index, message in enumerate(found) if message == wanted), None)


def is_transcript(text: str) -> bool:
    """Whether a text is a transcript "\\n\\nHuman: ... \\n\\nAssistant: ..." (hh-rlhf), to be answered or not."""
    return _TRANSCRIPT.match(text) is not None


def transcript_messages(transcript: str) -> Conversation:
    """The messages of a transcript without surrounding white space; the "\\n\\nAssistant:" at its end is no message."""
    text = "\n\n" + transcript.strip()
    parts = TURN.split(text.removesuffix("\n\nAssistant:"))[1:]
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def conversation_of(prompt: str | Conversation) -> str:
    """What examples are held out by: a plain prompt, or the conversation's first user message."""
    if isinstance(prompt, str):
        return transcript_messages(prompt)[0]["content"] if is_transcript(prompt) else prompt
    return next((message["content"] for message in prompt if message["role"] == "user"), "")


def columns(record: Record) -> str:
    """The end of a remedy: the keys that a record has."""
    found = [key for key, value in record.fields.items() if value is not None]
    return f"; the record has {', '.join(sorted(found)[:9])}" if found else ""
