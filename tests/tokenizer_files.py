"""Tokenizers as files of a directory, the way transformers 5 writes them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CHAT = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
SPECIAL = ["<s>", "</s>", "<|turn|>", "<|eot|>", "<img>"]  # 256 to 260; <think>, which is not special, is 261
# Keys that every file of version 5 has.
V5 = {"backend": "tokenizers", "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}


def backend(prefix=False, start=False) -> Tokenizer:
    """Byte-level BPE of 262 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>"])
    if start:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return made


def write(directory: Path, config: dict, template: str | None = CHAT, made: Tokenizer | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (made or backend()).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory
