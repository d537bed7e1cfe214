"""A Hugging Face model directory, read tensor by tensor from safetensors; pickled weights are never opened."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from nemo_brain.convert.source import check_finite
from nemo_brain.convert.weight_files import open_tensors, weight_files
from nemo_brain.core.json_files import read_object
from nemo_brain.data.tokenizers import load_tokenizer


class HuggingFaceDirectory:
    """A directory written by ``save_pretrained``: config.json, one or several safetensors files, the tokenizer.

    Args:
        path: the directory.
        finite_unless: see ``open_weights``.

    Raises ValueError on a directory without config.json, without safetensors, with quantised weights or damaged files,
    or files that are not those of their index.
    """

    def __init__(self, path: Path, finite_unless: str | None):
        self.path = path
        self._finite_unless = finite_unless
        config = path / "config.json"
        if not config.is_file():
            raise ValueError(f"{path}: no config.json, so this is not a Hugging Face model directory")
        self.config = read_object(config)
        if self.config.get("quantization_config"):
            raise ValueError(f"{path}: quantization_config in config.json is not supported; save the model unquantised")
        generation = path / "generation_config.json"
        self.generation_config = read_object(generation) if generation.is_file() else {}
        self._files = weight_files(path)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        rows = self.config.get("vocab_size")
        return load_tokenizer(self.path, key=None, end_token=False, vocab_size=rows)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name. ValueError: it is not finite."""
        file = self._files[name]
        with open_tensors(file) as tensors:
            return check_finite(tensors.get_tensor(name), f"{file}: {name}", self._finite_unless)
