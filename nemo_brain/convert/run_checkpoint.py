"""A run's own checkpoint as ``Weights``: Megatron's distributed format, read in one process and without its layout.

The checkpoint says which start model the run had; that one gives architecture and tokenizer, its tensors are not read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerFast

from nemo_brain.convert.source import check_finite
from nemo_brain.durability import checkpoint
from nemo_brain.host.checkpoint_index import ModelReader
from nemo_brain.model.parameters import VOCABULARY_TENSORS, layer_tensor

if TYPE_CHECKING:
    from nemo_brain.model.weights import Weights


class RunWeights:
    """``Weights`` of the model that a checkpoint holds.

    Args:
        path: a complete checkpoint, see ``checkpoint``; it is not checked for damage.
        start: the weights of the run's start model.
        finite_unless: see ``open_weights``.
    """

    def __init__(self, path: Path, start: Weights, finite_unless: str | None):
        self.gpt_config, self.vocab_size, self._start = start.gpt_config, start.vocab_size, start
        self.generation_config = start.generation_config
        self._path, self._reader, self._finite_unless = path, ModelReader(path / "weights"), finite_unless
        self._stored = {  # by canonical name
            stored.name if stored.layer is None else layer_tensor(stored.layer, stored.name): stored
            for stored in self._reader.tensors()
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._start.tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._start.stop_token_ids

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The full tensor of a canonical Megatron name in the dtype that the run trained in; ValueError for others, and
        for one that is not finite."""
        if name not in self._stored:
            raise ValueError(f"{name}: the checkpoint {self._path}/weights has no such tensor")
        full = self._reader.read(self._stored[name])
        check_finite(full, f"{self._path}/weights: {name}", self._finite_unless)
        return full[: self.vocab_size] if name in VOCABULARY_TENSORS else full


def newest_intact(path: Path) -> Path:
    """The checkpoint ``path``, or the newest intact one of a run's directory; every file is compared with its checksum.

    Raises:
        ValueError: there is none.
    """
    problems: list[str] = []
    for found in checkpoint.find(path):
        for earlier in problems[-1:]:
            warnings.warn(f"checkpoint left out: {earlier}", stacklevel=2)
        problem = checkpoint.damage(found, 0, 1)
        if problem is None:
            return found
        problems.append(problem)
    raise ValueError(f"no intact checkpoint: {'; '.join(problems)} (name another one)")
