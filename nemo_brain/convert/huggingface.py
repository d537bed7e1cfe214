"""A Hugging Face model directory, read tensor by tensor from safetensors; pickled weights are never opened."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HuggingFaceDirectory:
    """A directory written by ``save_pretrained``: config.json, one or several safetensors files, the tokenizer.

    Raises ValueError on a directory without config.json, without safetensors, or with quantised weights.
    """

    def __init__(self, path: Path):
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(f"{path}: no config.json, so this is not a Hugging Face model directory")
        self.config = json.loads(config.read_text(encoding="utf-8"))
        if self.config.get("quantization_config"):
            raise ValueError(f"{path}: quantization_config in config.json is not supported; save the model unquantised")
        self._files = self._locate()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: its tokenizer cannot be read, expected tokenizer.json: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{self.path}: a fast tokenizer (tokenizer.json) is needed, not {type(tokenizer).__name__}"
            )
        return tokenizer

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor."""
        if (self.path / _INDEX).is_file():
            index = json.loads((self.path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {name: self.path / file for name, file in index.items()}
            absent = sorted({file.name for file in files.values() if not file.is_file()})
            if absent:
                raise ValueError(f"{self.path}: {_INDEX} names files that are not there: {', '.join(absent)}")
            return files
        single = self.path / _SINGLE
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        if pickled:
            raise ValueError(
                f"{self.path}: only pickled weights ({pickled[0]}), which can run code when they are opened. If you "
                "trust them, convert them once: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise ValueError(f"{self.path}: no {_SINGLE} and no {_INDEX}")
