"""A checkpoint on disk as the architectures see it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerFast


class CheckpointSource(Protocol):
    """A checkpoint on disk, in Hugging Face's terms: what the architectures translate from."""

    config: dict  # the keys of config.json
    generation_config: dict  # those of generation_config.json; {} without one

    @property
    def names(self) -> Collection[str]: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    def tensor(self, name: str) -> torch.Tensor: ...
