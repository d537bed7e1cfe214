"""A checkpoint on disk as the architectures see it."""

from __future__ import annotations

import math
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


def check_finite(tensor: torch.Tensor, name: str, unless: str | None) -> torch.Tensor:
    """The tensor, all of whose values must be finite.

    Args:
        name: its file and name, for the error.
        unless: the key that would allow others; None: they are allowed.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if unless is None or not tensor.is_floating_point() or not tensor.numel():
        return tensor
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # of eight bits there is no arithmetic
    # One pass at the memory's speed, which isfinite() is far from: NaN is both the least and the greatest.
    if not all(map(math.isfinite, map(torch.Tensor.item, torch.aminmax(values)))):
        wrong = int((~values.isfinite()).sum())
        raise ValueError(
            f"{name} is not finite: {wrong} of {tensor.numel()} values are NaN or infinite (copy the file again, or "
            f"take it as it is with {unless}=true)"
        )
    return tensor
