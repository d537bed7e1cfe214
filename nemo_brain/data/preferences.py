"""Preference files: pairs of a chosen and a rejected output to one prompt, in the formats of TRL and of hh-rlhf."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Group
from nemo_brain.data import conversations
from nemo_brain.data.conversations import TURN, Conversation, conversation_of, index_of, is_transcript, parse_messages
from nemo_brain.data.examples import ExampleSet, given_output
from nemo_brain.data.prompts import parse_prompt
from nemo_brain.data.records import Record, Source, kind, read_records
from nemo_brain.data.stop import Stop
from nemo_brain.data.templates import Template

OWN = (*conversations.OWN, "chosen", "rejected", "margin")  # keys of a record that are no metadata of its prompt
FORKS = ("refuse", "cut")
# What files call the prompt that are not TRL's: without it a common beginning of the answers would pass for one.
_OTHER_PROMPTS = ("messages", "question", "instruction", "query", "input", "context", "post", "history")
_EXAMPLE = 'write {"prompt": ..., "chosen": ..., "rejected": ...}'


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
    forks: str = "refuse",
    key: str = "data.train",
) -> ExampleSet[Preference]:
    """Reads preference pairs.

    A record has ``chosen`` and ``rejected``, and may have ``prompt``, ``system`` (text: a system message before the
    prompt's), ``margin`` (default 0) and ``id``; what is null is not there:

    - text with a text ``prompt``: a plain prompt and two outputs;
    - messages, with or without a ``prompt`` of messages: without it the prompt is their common beginning, and what
      follows is one message of the assistant in each (TRL's conversational format). Messages may repeat the prompt,
      which may then be text (UltraFeedback's);
    - transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." (hh-rlhf): the prompt is their common beginning up to an
      "\\n\\nAssistant:", the outputs are what follows. With ``data.template=chat`` the prompt is read as messages;
    - other texts without a prompt: their common beginning, whole words of it, is the prompt (TRL's implicit prompt).

    Args:
        source: a JSONL file (.gz: compressed), a list of them, or an iterable of records.
        tokenizer, template, max_prompt_tokens, key: as in ``load_prompts``.
        stop: what ends the outputs.
        max_output_tokens: longer outputs lose tokens on the right, the end token among them.
        forks: transcripts and messages that part before the last answer, or go on behind it, are refused
            (``refuse``), or the pair is the two answers with which they part (``cut``).

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    pairs: list[Preference] = []
    cut_prompts = cut_outputs = 0
    for record, prompt, answers in read_pairs(source, rendering.chat, forks, key):
        parsed = parse_prompt(record.with_prompt(prompt, OWN), rendering, max_prompt_tokens)
        outputs = [given_output(tokenizer, text, max_output_tokens, stop) for text in answers]
        cut_outputs += sum(not output.ended for output in outputs)
        if outputs[0].token_ids == outputs[1].token_ids:
            raise record.error("chosen and rejected are the same", "remove the line, or raise data.max_output_tokens")
        margin = record.number("margin", 0.0 if record.fields.get("margin") is None else record.fields["margin"])
        pairs.append(Preference(Group(parsed, outputs), margin, conversation_of(prompt)))
        cut_prompts += parsed.truncated
    return ExampleSet(pairs, cut_prompts, cut_outputs)


def read_pairs(
    source: Source, chat: bool, forks: str, key: str
) -> Iterator[tuple[Record, str | Conversation, list[str]]]:
    """Records with their prompts and their two answers' texts, the chosen one first; ``chat``: transcripts are read as
    messages. Else, and errors, as in ``load_preferences``."""
    for record in read_records(source, key):
        prompt, answers = _split(record, chat, forks == "cut")
        yield record, conversations.with_system(record, prompt, chat), answers


def prompts(source: Source) -> Iterator[dict[str, Any]]:
    """The prompts of preference pairs, the chosen answers as their references: ``data.train._target_`` of BRAIn.

    Args:
        source: as in ``load_preferences``. Pairs that it refuses are left out, and prompts that come again.
    """
    seen = set()
    for record in read_records(source, "source"):
        try:
            prompt, (chosen, _) = _split(record, chat=False, cut=True)
        except ValueError:
            continue
        if (key := repr(prompt)) not in seen:
            seen.add(key)
            yield {"messages" if isinstance(prompt, list) else "prompt": prompt, "reference": chosen.strip()}


def demonstrations(source: Source) -> Iterator[dict[str, Any]]:
    """The same of textual pairs, as prompts with completions: ``data.train._target_`` of fine-tuning."""
    for found in prompts(source):
        yield {"prompt": found["prompt"], "completion": f" {found['reference']}"}


def _split(record: Record, chat: bool, cut: bool) -> tuple[str | Conversation, list[str]]:
    """The prompt of a record, text or messages, and the texts of the chosen and the rejected output."""
    sides = []
    for name in ("chosen", "rejected"):
        if name not in record.fields:
            raise record.error(f"no {name}", _EXAMPLE + conversations.columns(record))
        sides.append(record.fields[name])
    prompt: Any = record.fields.get("prompt")
    kinds = {type(side) for side in sides}
    if len(kinds) != 1 or not kinds <= {str, list} or type(prompt) not in (str, *kinds, type(None)):
        shown = zip(("chosen", "rejected", "prompt"), (*sides, prompt), strict=True)
        what = ", ".join(f"{name} is {kind(value)}" for name, value in shown if name != "prompt" or value is not None)
        raise record.error(what, "make all of them text, or all of them lists of messages")
    if list in kinds:
        sides = [parse_messages(record, name, side) for name, side in zip(("chosen", "rejected"), sides, strict=True)]
        messages = record.fields.get("messages")
        if prompt is None and messages is not None:  # UltraFeedback's are the chosen ones once more
            messages = parse_messages(record, "messages", messages)
            prompt = None if messages in sides else messages
        return _split_messages(record, sides, prompt, cut)
    transcripts = sum(map(is_transcript, sides))
    if transcripts == 2 or (transcripts and prompt is None):
        return _split_transcripts(record, sides, prompt, chat, cut)
    if prompt is not None:
        return prompt, _answers(record, sides, chat, cut) if is_transcript(prompt) else sides
    for name in _OTHER_PROMPTS:
        if record.fields.get(name):
            raise record.error(f"no prompt, but {name}", f"call the prompt so{conversations.columns(record)}")
    common = _common(sides)
    end = max(common.rfind(" "), common.rfind("\n"))
    if end <= 0:
        raise record.error("chosen and rejected have no common beginning", "give the prompt that they answer")
    return common[:end], [side[end:] for side in sides]


def _split_transcripts(
    record: Record, sides: list[str], prompt: str | None, chat: bool, cut: bool
) -> tuple[str, list[str]]:
    common = _common(sides)
    if prompt is not None and not common.startswith(prompt.rstrip()):
        raise record.error("chosen and rejected are transcripts that do not begin with the prompt", "leave it out")
    ends = [match.end() for match in TURN.finditer(common) if match[1] == "Assistant"]
    if not ends:
        raise record.error(
            "chosen and rejected have no common beginning up to an answer of the assistant",
            "give two answers to the same prompt, or remove the line",
        )
    return sides[0][: ends[-1]], _answers(record, [side[ends[-1] :] for side in sides], chat, cut)


def _answers(record: Record, rests: list[str], chat: bool, cut: bool) -> list[str]:
    """What follows a transcript's last "\\n\\nAssistant:", which must be one answer, or is ``cut`` to it."""
    turns = []
    for rest in rests:
        answer, *more = TURN.split(rest)
        turns.append([("assistant", answer.strip() if chat else answer), *zip(more[::2], more[1::2], strict=True)])
    return _one_answer(record, turns, cut)


def _split_messages(
    record: Record, sides: list[Conversation], prompt: str | list | None, cut: bool
) -> tuple[Conversation, list[str]]:
    if isinstance(prompt, list):
        begin = parse_messages(record, "prompt", prompt)
        repeated = all(side[: len(begin)] == begin for side in sides)
        rests = [side[len(begin) :] for side in sides] if repeated else sides
    else:
        common = 0
        while common < min(map(len, sides)) and sides[0][common] == sides[1][common]:
            common += 1
        # The prompt ends where the assistant is to answer.
        while common and sides[0][common - 1]["role"] == "assistant":
            common -= 1
        begin, rests = sides[0][:common], [side[common:] for side in sides]
        if prompt is not None and index_of(begin, prompt) is None:
            raise record.error(
                "prompt is a string, chosen and rejected are lists of messages that do not both repeat it",
                "leave the prompt out, or make it a list of messages",
            )
        if not begin:
            raise record.error("chosen and rejected have no common beginning", "give the prompt that they answer")
    for name, rest in zip(("chosen", "rejected"), rests, strict=True):
        if not rest or rest[0]["role"] != "assistant":
            raise record.error(
                f"{name} goes on with {len(rest)} messages after the common prompt, not with one of the assistant",
                'end both with [{"role": "assistant", "content": "..."}] to the same prompt, or remove the line',
            )
    turns = [[(message["role"], message["content"]) for message in rest] for rest in rests]
    return begin, _one_answer(record, turns, cut)


def _one_answer(record: Record, sides: list[list[tuple[str, str]]], cut: bool) -> list[str]:
    """The assistant's answers, of the turns (role and content) that follow the prompt on each side: the only ones,
    unless the others are ``cut``."""
    (_, chosen), (_, rejected) = sides[0][0], sides[1][0]
    if chosen.strip() == rejected.strip() and max(map(len, sides)) > 1:
        raise record.error(
            "chosen and rejected part in what the human says, not in an answer",
            "give two answers to the same prompt, or remove the line",
        )
    for name, turns in zip(("chosen", "rejected"), sides, strict=True):
        if len(turns) > 1 and not cut:
            raise record.error(
                f"{name} goes on with {len(turns)} messages after the common prompt, the last of role "
                f"{turns[-1][0].lower()}, not with one answer",
                "end both with one answer of the assistant to the same prompt, or set data.forks=cut: the pair is then "
                "the two answers with which they part",
            )
    return [chosen, rejected]


def _common(sides: list[str]) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))
    return "".join(character for character, _ in same)
