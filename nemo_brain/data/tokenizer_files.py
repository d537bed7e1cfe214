"""A tokenizer as its files say, also where transformers 5 wrote them and transformers 4 reads them.

Version 5 takes tokenizer.json for the whole law, whatever class is named beside it; it writes neither
special_tokens_map.json nor added_tokens_decoder, lists further special tokens under ``extra_special_tokens`` (a dict in
version 4) and names classes that version 4 does not have. Version 4's classes change what they have read, by defaults
of their own: its LlamaTokenizerFast puts a [BOS] in front of every text where version 5 wrote that there is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.utils import logging

from nemo_brain.core.json_files import read_object

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # version 5's name for the first; both are tokenizer.json


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory; nothing is downloaded, and no code in it is run.

    A class that the installed transformers does not have is read as PreTrainedTokenizerFast, with a warning that names
    it: what ``save_pretrained`` writes to tokenizer.json is the whole law, whichever class it was. A class of the
    directory's own code is refused: that may tokenise as it likes.

    Raises:
        Exception: of many types, transformers' and tokenizers' own.
    """
    config, model = (_object(path / name) for name in ("tokenizer_config.json", "config.json"))
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    own = _class(name) if name and name not in _GENERIC else None
    known = own or name in _GENERIC or (name is None and model.get("model_type") in TOKENIZER_MAPPING_NAMES)
    auto_maps = [file.get("auto_map") or {} for file in (config, model)]
    if not known and any(isinstance(auto_map, list) or "AutoTokenizer" in auto_map for auto_map in auto_maps):
        raise ValueError(f"its class {name} is code in the directory (auto_map), which is never run")
    later = "backend" in config or isinstance(config.get("extra_special_tokens"), list)
    options = {"local_files_only": True, "trust_remote_code": False}
    if not (path / "tokenizer.json").is_file() or (known and name not in _GENERIC and not later):
        return AutoTokenizer.from_pretrained(path, **options)
    if name and not known:
        warnings.warn(
            f"{path}: the installed transformers has no tokenizer class {name}: tokenizer.json is read as it stands",
            stacklevel=3,
        )
    if later:
        options |= _special_tokens(config)
        # Version 4's default has token_type_ids too, which language models refuse.
        inputs = getattr(own, "model_input_names", ["input_ids", "attention_mask"])
        options["model_input_names"] = config.get("model_input_names", inputs)
    splits = _object(path / "tokenizer.json").get("pre_tokenizer") or {}
    if "add_prefix_space" in splits:  # which version 4 sets to False, unless it is told
        options["add_prefix_space"] = splits["add_prefix_space"]
    with _no_word_of_classes():
        return PreTrainedTokenizerFast.from_pretrained(path, **options)


def _class(name: str) -> type | None:
    """The installed class of that name, as AutoTokenizer finds it."""
    return tokenizer_class_from_name(f"{name.removesuffix('Fast')}Fast") or tokenizer_class_from_name(name)


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Version 5's special tokens by version 4's names: a list of them, and those that the chat template may name."""
    extra = config.get("extra_special_tokens") or []
    named = {**config.get("model_specific_special_tokens", {}), **(extra if isinstance(extra, dict) else {})}
    for name, value in config.items():
        known = name in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES
        if name.endswith("_token") and not known and isinstance(value, str | dict):
            named[name] = value
    tokens = [*(config.get("additional_special_tokens") or []), *(extra if isinstance(extra, list) else [])]
    return {
        "additional_special_tokens": [_token(token) for token in tokens],
        "extra_special_tokens": {name: _token(token) for name, token in named.items()},
    }


def _token(token: str | dict[str, Any]) -> str | AddedToken:
    if isinstance(token, str):
        return token
    return AddedToken(**{name: value for name, value in token.items() if name != "__type"} | {"special": True})


def _object(file: Path) -> dict[str, Any]:
    """What a JSON file holds; {} where there is none."""
    return read_object(file) if file.is_file() else {}


@contextmanager
def _no_word_of_classes() -> Iterator[None]:
    """Without transformers' warning that the class that is named is not the one that reads."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
