"""A Hugging Face model directory, read tensor by tensor from safetensors; pickled weights are never opened."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from nemo_brain.data.tokenizers import load_tokenizer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HuggingFaceDirectory:
    """A directory written by ``save_pretrained``: config.json, one or several safetensors files, the tokenizer.

    Raises ValueError on a directory without config.json, without safetensors, with quantised weights or damaged files.
    """

    def __init__(self, path: Path):
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(f"{path}: no config.json, so this is not a Hugging Face model directory")
        self.config = _read_object(config)
        if self.config.get("quantization_config"):
            raise ValueError(f"{path}: quantization_config in config.json is not supported; save the model unquantised")
        generation = path / "generation_config.json"
        self.generation_config = _read_object(generation) if generation.is_file() else {}
        self._files = self._locate()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        rows = self.config.get("vocab_size")
        return load_tokenizer(self.path, key=None, end_token=False, vocab_size=rows)

    def tensor(self, name: str) -> torch.Tensor:
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor."""
        if (self.path / _INDEX).is_file():
            index = _read_object(self.path / _INDEX).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
                raise ValueError(f"{self.path}: {_INDEX} has no weight_map of names and files (copy it again)")
            files = {name: self.path / file for name, file in index.items()}
            absent = sorted({file.name for file in files.values() if not file.is_file()})
            if absent:
                raise ValueError(f"{self.path}: {_INDEX} names files that are not there: {', '.join(absent)}")
            return files
        single = self.path / _SINGLE
        if single.is_file():
            with _open(single) as file:
                return dict.fromkeys(file.keys(), single)
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        if pickled:
            raise ValueError(
                f"{self.path}: only pickled weights ({pickled[0]}), which can run code when they are opened. If you "
                "trust them, convert them once: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise ValueError(f"{self.path}: no {_SINGLE} and no {_INDEX}")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut off: {error} (copy it again)") from error


def _read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error} (copy it again)") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object (copy it again)")
    return content
