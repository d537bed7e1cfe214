"""Tokenizers: loading, exact text of tokens, and encoding that never lets untrusted text become special tokens.

The tokenizers are ``transformers.PreTrainedTokenizerFast``.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nemo_brain.data.tokenizer_files import read_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer over bytes: ids 0-255 are the bytes of the UTF-8 text, 256 is ``<eos>`` and 257 ``<pad>``."""
    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # all that a language model's forward takes
    )


def load_tokenizer(
    path: str | Path, *, key: str | None = "model.restore_from", end_token: bool = True, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory. Nothing is downloaded, and no code in it is run.

    Special tokens behind the model's embedding are warned about where nothing writes them by itself, such as a padding
    token that was added later; a template that writes one is refused when it does.

    Args:
        path: the directory.
        key: the configuration key that errors name; None: they name the directory alone.
        end_token: whether the tokenizer must have one.
        vocab_size: rows of the model's embedding; None: as many as the tokenizer has tokens.

    Raises:
        ValueError: there is no such directory, no fast tokenizer in it, it has no end token, or it makes tokens of text
            that the model has no embedding for.
    """
    path = Path(path)
    prefix = "" if key is None else f"{key}: "
    if not path.is_dir():
        raise ValueError(f"{prefix}{path} is not a directory (give a Hugging Face directory with a tokenizer.json)")
    try:
        tokenizer = read_tokenizer(path)
    except Exception as error:  # transformers raises many types here
        raise ValueError(
            f"{prefix}{path} has no tokenizer that can be loaded: {error} (save one there with "
            "tokenizer.save_pretrained, which writes tokenizer.json and tokenizer_config.json)"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{prefix}{path} holds a {type(tokenizer).__name__}, which has no tokenizer.json (convert it to a fast "
            "tokenizer and save it there)"
        )
    if end_token and tokenizer.eos_token_id is None:
        raise ValueError(f"{prefix}the tokenizer in {path} has no end token (set eos_token in tokenizer_config.json)")
    if vocab_size is not None:
        ends = [tokenizer.eos_token_id] if end_token else []
        _check_rows(tokenizer, vocab_size, ends, f"{prefix}the tokenizer in {path}")
    return tokenizer


def _check_rows(tokenizer: PreTrainedTokenizerFast, vocab_size: int, ends: Sequence[int], subject: str) -> None:
    """ValueError for a token without an embedding that text or the tokenizer itself makes; a warning for others."""
    behind = {index: token for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    if not behind:
        return
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    own = {*tokenizer("a").input_ids, *tokenizer("a", "a").input_ids, *ends}
    made = sorted(index for index in behind if index in own or index not in special)
    index = made[0] if made else min(behind)
    lack = (
        f"{subject} gives {behind[index]!r} the id {index}, but the model's embedding has {vocab_size} rows "
        "(vocab_size in config.json)"
    )
    if made:
        raise ValueError(
            f"{lack} (use the tokenizer that the model was saved with, or resize the model: "
            "model.resize_token_embeddings(len(tokenizer)))"
        )
    _WITHOUT_ROW[tokenizer] = behind
    warnings.warn(f"{lack}; a template that writes it is refused", stacklevel=3)


_WITHOUT_ROW: WeakKeyDictionary[PreTrainedTokenizerFast, dict[int, str]] = WeakKeyDictionary()


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of tokens, exactly: no space is cleaned up, whatever the tokenizer's configuration says.

    Special tokens stand in it as they are spelled; an id without a token has no text. Bytes that are no UTF-8, as at
    the end of a row that was cut inside a character, are U+FFFD. A row's text is not that of its parts put together:
    more bytes may complete a character, and a piece at the start loses its space.
    """
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of untrusted text: no part of it becomes a special token, and none is added.

    Text that spells no special token gets what ``tokenizer(text, add_special_tokens=False)`` gives.
    """
    return protect(tokenizer).encode(text)


def start_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens that the tokenizer itself puts in front of every text: [BOS] for many models, or none."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    return [token for token, special in itertools.takewhile(lambda pair: pair[1], pairs)]


def protect(tokenizer: PreTrainedTokenizerFast) -> ProtectedTokenizer:
    """The tokenizer's protected twin, made once (take it after all special tokens are set)."""
    if tokenizer not in _PROTECTED:
        _PROTECTED[tokenizer] = ProtectedTokenizer(tokenizer)
    return _PROTECTED[tokenizer]


_PROTECTED: WeakKeyDictionary[PreTrainedTokenizerFast, ProtectedTokenizer] = WeakKeyDictionary()


class ProtectedTokenizer:
    """A copy of a tokenizer in which every special token is spelled by a secret alias, with the same id.

    Untrusted text cannot spell an alias, so it is tokenised as if the special tokens did not exist. Trusted text, such
    as what a chat template writes around the messages, goes through ``alias`` first and keeps its special tokens. As
    the algorithm is the tokenizer's own, run once over the whole text, benign text gets exactly the tokenizer's ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        special = {token["content"] for token in state["added_tokens"] if token["special"]}
        # Longest first: where two special tokens match, the tokenizer takes the longest, and so must the pattern.
        self._special = sorted(special | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._prefixes = {token[:n] for token in self._special for n in range(1, len(token) + 1)}
        self._suffixes = {token[n:] for token in self._special for n in range(len(token))}
        # Aliases and quotes hold letters and digits only: no filter of a chat template changes them.
        self._nonce = secrets.token_hex(8)
        self._aliases = {token: f"{self._nonce}x{index}z" for index, token in enumerate(self._special)}
        self._quoted = re.compile(self._nonce + "q([0-9a-f]*)z")
        self._backend = Tokenizer.from_str(json.dumps(_respell(state, self._aliases)))
        self._without_row = _WITHOUT_ROW.get(tokenizer, {})
        for token, alias in self._aliases.items():
            if self._backend.token_to_id(alias) != tokenizer.convert_tokens_to_ids(token):
                raise ValueError(
                    f"the tokenizer's special token {token!r} cannot be told apart from text (save the tokenizer with "
                    "save_pretrained and load it again, so that its tokenizer.json holds all special tokens)"
                )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; only aliases become special tokens. ValueError: the model has no embedding for one."""
        return self.encoding(text).ids

    def encoding(self, text: str) -> Encoding:
        """Like ``encode``, as the tokenizer's post-processor takes it."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        for index in self._without_row.keys() & encoding.ids:
            raise ValueError(
                f"the template writes {self._without_row[index]!r}, for whose id {index} the model has no embedding "
                "(take it out of the template, or resize the model: model.resize_token_embeddings(len(tokenizer)))"
            )
        return encoding

    def alias(self, text: str) -> str:
        """Trusted text with its special tokens spelled by their aliases."""
        return self._pattern.sub(lambda match: self._aliases[match[0]], text)

    def quote(self, text: str) -> str:
        """Untrusted text in which nothing reads as a special token, nor as a part of one at either end."""
        body = text.strip()
        if not body:
            return text
        head = max((len(part) for part in self._suffixes if body.startswith(part)), default=0)
        tail = max((len(part) for part in self._prefixes if body.endswith(part)), default=0)
        if head + tail > len(body) or any(body in token for token in self._special):
            quoted = self._quote(body)
        else:
            end = len(body) - tail
            middle = self._pattern.sub(lambda match: self._quote(match[0]), body[head:end])
            quoted = self._quote(body[:head]) + middle + self._quote(body[end:])
        start = text.index(body)
        return text[:start] + quoted + text[start + len(body) :]

    def unquote(self, text: str) -> str:
        """``text`` with what ``quote`` hid spelled out again."""
        return self._quoted.sub(lambda match: bytes.fromhex(match[1]).decode(), text)

    def _quote(self, text: str) -> str:
        return f"{self._nonce}q{text.encode().hex()}z" if text else ""


def _respell(state: dict, aliases: dict[str, str]) -> dict:
    """A tokenizer.json with tokens renamed in the vocabulary, the merges, the unknown token and the added tokens."""
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {aliases.get(token, token): index for token, index in model["vocab"].items()}
    else:  # Unigram: pieces with scores
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if aliases.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    for token in state["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    return {**state, "truncation": None, "padding": None, "post_processor": None}
