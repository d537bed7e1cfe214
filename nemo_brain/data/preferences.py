"""Preference files: pairs of a chosen and a rejected output to one prompt, in the formats of TRL and of hh-rlhf."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Group
from nemo_brain.data.examples import ExampleSet, given_output
from nemo_brain.data.prompts import parse_prompt
from nemo_brain.data.records import Record, Source, kind, read_records
from nemo_brain.data.stop import Stop
from nemo_brain.data.templates import Template

OWN = ("prompt", "messages", "chosen", "rejected", "margin")  # keys of a record that are no metadata of its prompt
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\n\nHuman:")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Preference:
    """A pair: a group whose outputs are the chosen and the rejected one, ended unless they were cut. The chosen reward
    should exceed the rejected one by ``margin``. Pairs of one ``conversation`` are not held out from each other."""

    group: Group
    margin: float
    conversation: str


def load_preferences(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerFast,
    stop: Stop,
    template: str | None,
    max_prompt_tokens: int,
    max_output_tokens: int,
    key: str = "data.train",
) -> ExampleSet[Preference]:
    """Reads preference pairs.

    A record has ``chosen`` and ``rejected``, and may have ``prompt``, ``margin`` (default 0) and ``id``:

    - text with a text ``prompt``: a plain prompt and two outputs;
    - messages, with or without a ``prompt`` of messages: without it the prompt is their common beginning, and what
      follows is one message of the assistant in each (TRL's conversational format);
    - transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." (hh-rlhf): the prompt is their common beginning up to an
      "\\n\\nAssistant:", the outputs are what follows. With ``data.template=chat`` the prompt is read as messages;
    - other texts without a prompt: their common beginning, whole words of it, is the prompt (TRL's implicit prompt).

    Args:
        source: a JSONL file (.gz: compressed), a list of them, or an iterable of records.
        tokenizer, template, max_prompt_tokens, key: as in ``load_prompts``.
        stop: what ends the outputs.
        max_output_tokens: longer outputs lose tokens on the right, the end token among them.

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    pairs: list[Preference] = []
    cut_prompts = cut_outputs = 0
    for record in read_records(source, key):
        prompt, answers = _split(record, rendering.chat)
        parsed = parse_prompt(record.with_prompt(prompt, OWN), rendering, max_prompt_tokens)
        outputs = [given_output(tokenizer, text, max_output_tokens, stop) for text in answers]
        cut_outputs += sum(not output.ended for output in outputs)
        if outputs[0].token_ids == outputs[1].token_ids:
            raise record.error("chosen and rejected are the same", "remove the line, or raise data.max_output_tokens")
        margin = record.number("margin", record.fields.get("margin", 0.0))
        pairs.append(Preference(Group(parsed, outputs), margin, conversation_of(prompt)))
        cut_prompts += parsed.truncated
    return ExampleSet(pairs, cut_prompts, cut_outputs)


def conversation_of(prompt: str | list[dict]) -> str:
    """What examples are held out by: a plain prompt, or the conversation's first user message."""
    if isinstance(prompt, str):
        return _messages(prompt)[0]["content"] if _TRANSCRIPT.match(prompt) else prompt
    return next((message["content"] for message in prompt if message["role"] == "user"), "")


def _split(record: Record, chat: bool) -> tuple[str | list[dict], list[str]]:
    """The prompt of a record, text or messages, and the texts of the chosen and the rejected output."""
    sides = []
    for name in ("chosen", "rejected"):
        if name not in record.fields:
            raise record.error(f"no {name}", 'write {"prompt": ..., "chosen": ..., "rejected": ...}')
        sides.append(record.fields[name])
    prompt = record.fields.get("prompt")
    types = {type(value) for value in (*sides, prompt) if value is not None}
    if None in sides or len(types) != 1 or not types <= {str, list}:
        kinds = ", ".join(f"{name} is {kind(value)}" for name, value in _named(sides, prompt))
        raise record.error(kinds, "make all of them text, or all of them lists of messages")
    if list in types:
        return _split_messages(record, sides, prompt)
    if prompt is not None:
        return prompt, sides
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))
    common = "".join(character for character, _ in same)
    if all(_TRANSCRIPT.match(side) for side in sides):
        ends = [match.end() for match in _TURN.finditer(common) if match[1] == "Assistant"]
        end = ends[-1] if ends else 0
    else:
        end = max(common.rfind(" "), common.rfind("\n"))
    if end <= 0:
        raise record.error("chosen and rejected have no common beginning", "give the prompt that they answer")
    prompt, answers = common[:end], [side[end:] for side in sides]
    if chat and _TRANSCRIPT.match(prompt):
        return _messages(prompt), [answer.strip() for answer in answers]
    return prompt, answers


def _split_messages(record: Record, sides: list[list], prompt: list | None) -> tuple[list[dict], list[str]]:
    if prompt is None:
        common = 0
        while common < min(map(len, sides)) and sides[0][common] == sides[1][common]:
            common += 1
        # The prompt ends where the assistant is to answer.
        while common and isinstance(sides[0][common - 1], dict) and sides[0][common - 1].get("role") == "assistant":
            common -= 1
        prompt, sides = sides[0][:common], [side[common:] for side in sides]
        if not prompt:
            raise record.error("chosen and rejected have no common beginning", "give the prompt that they answer")
    answers = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        message = side[0] if len(side) == 1 else None
        if not isinstance(message, dict) or message.keys() != {"role", "content"} or message["role"] != "assistant":
            raise record.error(
                f"{name} goes on with {len(side)} messages after the common prompt, not with one of the assistant",
                'end both with [{"role": "assistant", "content": "..."}] to the same prompt, or remove the line',
            )
        answers.append(record.text(f"{name}: content", message["content"]))
    return prompt, answers


def _messages(transcript: str) -> list[dict[str, str]]:
    """The messages of an hh-rlhf transcript that ends in "\n\nAssistant:", without surrounding whitespace."""
    parts = _TURN.split(transcript.removesuffix("\n\nAssistant:"))[1:]
    return [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _named(sides: list, prompt: object) -> list[tuple[str, object]]:
    return [("chosen", sides[0]), ("rejected", sides[1]), *([] if prompt is None else [("prompt", prompt)])]
