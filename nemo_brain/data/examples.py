"""Examples for a training by epochs: what their files gave, and which of them are held out."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Group, Output
from nemo_brain.data.prompts import split_holdout
from nemo_brain.data.records import made_source
from nemo_brain.data.stop import Stop


class Example(Protocol):
    """Examples of one ``conversation`` are not held out from each other."""

    group: Group
    conversation: str


T = TypeVar("T", bound=Example)


@dataclass
class ExampleSet(Generic[T]):
    """Examples, and how many of their prompts and outputs were cut to ``data.max_prompt_tokens`` and
    ``data.max_output_tokens``."""

    examples: list[T]
    cut_prompts: int
    cut_outputs: int


def checksum(examples: Sequence[Example]) -> str:
    """Of the examples as they are trained on: their number, and a CRC-32 of their tokens and what else they have."""
    crc = 0
    for example in examples:
        tokens = [example.group.prompt.token_ids, *(output.token_ids for output in example.group.outputs)]
        rest = {name: value for name, value in vars(example).items() if name != "group"}
        crc = zlib.crc32(repr((tokens, rest)).encode(), crc)
    return f"{len(examples)}:{crc:08x}"


def split_conversations(examples: Sequence[T], holdout: float, seed: int) -> tuple[list[T], list[T]]:
    """Training and held-out examples, by a hash of (seed, conversation), so that no prompt is on both sides.

    Args, Raises: as ``split_holdout``; what is counted are conversations.
    """
    conversations = list(dict.fromkeys(example.conversation for example in examples))
    _, held = split_holdout(conversations, holdout, seed)
    names = {conversations[index] for index in held}
    return [e for e in examples if e.conversation not in names], [e for e in examples if e.conversation in names]


def given_output(tokenizer: PreTrainedTokenizerFast, text: str, max_output_tokens: int, stop: Stop) -> Output:
    """A text as an output with its end token, unless it is cut to ``max_output_tokens``."""
    ids = stop.given(tokenizer, text)
    return Output(ids[:max_output_tokens], text, ended=len(ids) <= max_output_tokens)


def read_examples(
    data: Any, seed: int, tokenizer: PreTrainedTokenizerFast, stop: Stop, load: Callable[..., ExampleSet[T]]
) -> tuple[list[T], list[T]]:
    """Training and held-out examples, all read and checked; rank 0 says how many were cut.

    Args:
        data: a configuration's ``data`` section.
        stop: what ends the outputs.
        load: reads a source, as ``load_preferences`` and ``load_demonstrations`` do.
    """

    def read(source: Any, key: str) -> list[T]:
        loaded = load(
            made_source(source, key),
            tokenizer=tokenizer,
            stop=stop,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_output_tokens=data.max_output_tokens,
            key=key,
        )
        if (loaded.cut_prompts or loaded.cut_outputs) and int(os.environ.get("RANK", 0)) == 0:
            prompts = f"{loaded.cut_prompts} prompts were cut to {data.max_prompt_tokens} tokens"
            outputs = f"{loaded.cut_outputs} outputs to {data.max_output_tokens}"
            print(f"{key}: of {len(loaded.examples)} examples {prompts}, {outputs}")
        return loaded.examples

    train = read(data.train, "data.train")
    if data.validation is not None:
        return train, read(data.validation, "data.validation")
    if not data.holdout:
        return train, []
    return split_conversations(train, int(data.holdout) if data.holdout >= 1 else data.holdout, seed)
