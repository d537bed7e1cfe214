"""Demonstration files: prompts with the completion to imitate, as text or as messages, in the formats of TRL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Group
from nemo_brain.data import conversations
from nemo_brain.data.conversations import (
    Conversation,
    columns,
    conversation_of,
    index_of,
    is_transcript,
    parse_messages,
)
from nemo_brain.data.examples import ExampleSet, given_output
from nemo_brain.data.prompts import parse_prompt
from nemo_brain.data.records import Record, Source, kind, read_records
from nemo_brain.data.stop import Stop
from nemo_brain.data.templates import Template

TURNS = ("all", "last")
_OWN = (*conversations.OWN, "completion")
_EXAMPLE = 'write {"prompt": ..., "completion": ...} or {"messages": [...]}'


@dataclass
class Demonstration:
    """A group with one output: the completion, ended unless it was cut. Those of one ``conversation`` are not held out
    from each other."""

    group: Group
    conversation: str


def load_demonstrations(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerFast,
    stop: Stop,
    template: str | None,
    max_prompt_tokens: int,
    max_output_tokens: int,
    assistant_turns: str = "all",
    key: str = "data.train",
) -> ExampleSet[Demonstration]:
    """Reads demonstrations.

    A record has one of these, and may have ``system`` (text: a system message before the others) and ``id``; what is
    null is not there:

    - ``prompt`` and ``completion``, both text;
    - ``prompt`` and ``completion``, both messages;
    - ``messages``: a conversation; a text ``prompt`` beside it repeats one of the user's messages (UltraChat's).

    Messages end with one of the assistant. Each message of the assistant in ``completion`` or ``messages`` is a
    demonstration of its own: its prompt is all that precedes it, rendered as when the model is asked to answer, and the
    completion is its text and the end token.

    Args:
        source: a JSONL file (.gz: compressed), a list of them, or an iterable of records.
        tokenizer, template, max_prompt_tokens, key: as in ``load_prompts``.
        stop: what ends the outputs.
        max_output_tokens: longer completions lose tokens on the right, the end token among them.
        assistant_turns: ``all``, or ``last``: of a record's messages of the assistant only the last one.

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    demonstrations: list[Demonstration] = []
    cut_prompts = cut_outputs = 0
    for record in read_records(source, key):
        turns = list(_turns(record))
        for prompt, text in turns if assistant_turns == "all" else turns[-1:]:
            if not text:
                raise record.error("a completion is empty", "write it, or remove the line")
            if rendering.chat and isinstance(prompt, str) and is_transcript(prompt):
                text = text.strip()  # as its messages
            prompt = conversations.with_system(record, prompt, rendering.chat)
            parsed = parse_prompt(record.with_prompt(prompt, _OWN), rendering, max_prompt_tokens)
            output = given_output(tokenizer, text, max_output_tokens, stop)
            demonstrations.append(Demonstration(Group(parsed, [output]), conversation_of(prompt)))
            cut_prompts += parsed.truncated
            cut_outputs += not output.ended
    return ExampleSet(demonstrations, cut_prompts, cut_outputs)


def _turns(record: Record) -> Iterator[tuple[str | Conversation, str]]:
    """The prompts and completions of a record."""
    prompt, completion, messages = (record.fields.get(name) for name in ("prompt", "completion", "messages"))
    if messages is not None:
        messages = parse_messages(record, "messages", messages)
        repeated = prompt is None or (isinstance(prompt, str) and index_of(messages, prompt) is not None)
        if not repeated or completion is not None:
            raise record.error("both messages and prompt or completion", _EXAMPLE)
        yield from _assistant_turns(record, messages, 0)
    elif prompt is None or completion is None:
        raise record.error(f"no {'completion' if completion is None else 'prompt'}", _EXAMPLE + columns(record))
    elif isinstance(prompt, list) and isinstance(completion, list):
        before = parse_messages(record, "prompt", prompt)
        yield from _assistant_turns(record, [*before, *parse_messages(record, "completion", completion)], len(before))
    elif isinstance(prompt, str) and isinstance(completion, str):
        yield prompt, completion
    else:
        kinds = f"prompt is {kind(prompt)}, completion is {kind(completion)}"
        raise record.error(kinds, "make both text, or both lists of messages")


def _assistant_turns(record: Record, messages: Conversation, start: int) -> Iterator[tuple[Conversation, str]]:
    """What the assistant says from the message ``start`` on, each with all that precedes it."""
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise record.error(f"the last message is the {roles[-1]}'s", "end with the assistant's answer to train on")
    for index in range(start, len(messages)):
        if roles[index] != "assistant":
            continue
        if index == 0:
            raise record.error("the first message is the assistant's", "begin with the message that it answers")
        if roles[index - 1] == "assistant":
            raise record.error("two messages of the assistant in a row", "join them, or remove the line")
        yield messages[:index], messages[index]["content"]
