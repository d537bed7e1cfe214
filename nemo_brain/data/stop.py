"""What ends an output: tokens, and strings in its text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Output
from nemo_brain.data.templates import render_chat
from nemo_brain.data.tokenizers import decode, encode, protect


@dataclass(frozen=True)
class Stop:
    """What ends an output.

    Args:
        token_ids: each of these tokens does; it is the output's last and no part of its text.
        strings: each of these does in an output's text, which is what stands before it; the output's tokens go to the
            one that completes it.
        end: the token that a given text is ended with; None: there is none.
    """

    token_ids: tuple[int, ...]
    strings: tuple[str, ...] = ()
    end: int | None = None

    def ended(self, tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> bool:
        """Whether these tokens, of which the first ones did not, end an output. With strings all of it is decoded: text
        can change with the tokens that follow it."""
        return ids[-1] in self.token_ids or (bool(self.strings) and self._end(decode(tokenizer, ids)) is not None)

    def output(self, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> Output:
        """The output of sampled tokens."""
        by_token = ids[-1] in self.token_ids
        text = decode(tokenizer, ids[: len(ids) - by_token])
        end = self._end(text)
        return Output(ids, text[:end], by_token or end is not None)

    def given(self, tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        """The tokens of a text that ends by itself. ValueError where no token ends one."""
        if self.end is None:
            raise ValueError("no token ends a text (rollout.stop_token_ids=[]): give token ids")
        return [*encode(tokenizer, text), self.end]

    def _end(self, text: str) -> int | None:
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return min(places, default=None)


def named_token_ids(tokenizer: PreTrainedTokenizerFast, *files: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens of a model: the tokenizer's, then what ``eos_token_id`` of generation_config.json and config.json
    names, a number or a list.

    Tokens of ordinary text are left out, with a warning: transformers' classes of configurations have 2 or the like as
    a default, and write it whatever the tokenizer is.

    Raises:
        ValueError: ``eos_token_id`` is something else.
    """
    found: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for file in files:
        named = file.get("eos_token_id")
        items = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(item) is int for item in items):
            raise ValueError(f"eos_token_id is {named!r}, neither a token id nor a list of them")
        found += items
    own = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    for token in dict.fromkeys(token for token in found if token not in own):
        spelled = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
        what = "no token" if spelled is None else f"{spelled!r}, a token of ordinary text"
        warnings.warn(
            f"eos_token_id={token} in generation_config.json or config.json is {what}: it ends no output (if it is "
            "meant to, rollout.stop_token_ids names it)",
            stacklevel=2,
        )
    return tuple(dict.fromkeys(token for token in found if token in own))


def choose_stop(
    tokenizer: PreTrainedTokenizerFast,
    named: Sequence[int],
    template: str | None,
    *,
    token_ids: Iterable[int] | None = None,
    strings: Iterable[str] = (),
    vocab_size: int,
    key: str = "",
) -> Stop:
    """What ends the outputs of a model.

    A given text is ended by what the chat template closes the assistant's turn with, if that ends outputs; otherwise by
    the tokenizer's end token.

    Args:
        named: the model's end tokens, see ``named_token_ids``.
        template: ``data.template``.
        token_ids, strings: by configuration; None: the model's.
        vocab_size: rows of the embedding; the model cannot emit others.
        key: where ``token_ids`` can be given, for errors.

    Raises:
        ValueError: nothing ends an output, or a token id that was given is not in the vocabulary.
    """
    if token_ids is not None and (outside := [token for token in token_ids if not 0 <= token < vocab_size]):
        raise ValueError(f"{key}: {outside[0]} is no token of a vocabulary of {vocab_size}")
    known = [token for token in named if token < vocab_size]
    ids = tuple(dict.fromkeys(known if token_ids is None else token_ids))
    if not ids and token_ids is None and not strings:
        raise ValueError(
            "no token ends an output: neither the tokenizer nor generation_config.json nor config.json names one (set "
            f"{key + ', or ' if key else ''}eos_token_id in generation_config.json)"
        )
    closing = closing_token(tokenizer) if template == "chat" else None
    if closing is not None and closing not in ids:
        token = tokenizer.convert_ids_to_tokens(closing)
        warnings.warn(
            f"the chat template closes the assistant's turn with {token!r} ({closing}), which ends no output: outputs "
            f"end at {[tokenizer.convert_ids_to_tokens(index) for index in ids]} (add {closing} to "
            f"{key or 'eos_token_id in generation_config.json'})",
            stacklevel=2,
        )
    own = tokenizer.eos_token_id
    end = closing if closing in ids else own if own in ids else next(iter(ids), None)
    return Stop(ids, tuple(strings), end)


def closing_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The added token that the chat template writes behind an answer of the assistant; None: there is none."""
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text, _ = render_chat(tokenizer, messages, generation_prompt=False)
    except ValueError:
        return None  # it is refused where it is used
    _, found, behind = text.rpartition(answer)
    protected = protect(tokenizer)
    ids = protected.encode(protected.alias(behind)) if found else []
    added = tokenizer.added_tokens_decoder
    return next((token for token in ids if token in added), None)
