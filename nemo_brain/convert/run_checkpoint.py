"""A run's own checkpoint as ``Weights``: Megatron's distributed format, read in one process and without its layout.

The checkpoint says which start model the run had; that one gives architecture and tokenizer, its tensors are not read.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from transformers import PreTrainedTokenizerFast

from nemo_brain.durability import checkpoint
from nemo_brain.model.parameters import VOCABULARY_TENSORS, layer_tensor

if TYPE_CHECKING:
    from nemo_brain.model.weights import Weights

_MODEL = "module."  # what precedes the model's tensors in the checkpoint; the optimizer's have another beginning
_STACKED = re.compile(r"decoder\.layers\.(\D.*)")  # Megatron keeps the same tensor of all layers as one


class RunWeights:
    """``Weights`` of the model that a checkpoint holds.

    Args:
        path: a complete checkpoint, see ``checkpoint``; it is not checked for damage.
        start: the weights of the run's start model.
    """

    def __init__(self, path: Path, start: Weights):
        self.gpt_config, self.vocab_size, self._start = start.gpt_config, start.vocab_size, start
        self._reader = FileSystemReader(path / "weights")
        index = checkpoint.read_index(path)
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        # By canonical name: the key, its entry in the index, and the layer within it.
        self._places: dict[str, tuple[str, TensorStorageMetadata, int | None]] = {}
        for key, entry in index.state_dict_metadata.items():
            if not key.startswith(_MODEL) or not isinstance(entry, TensorStorageMetadata):
                continue
            name = key.removeprefix(_MODEL)
            if match := _STACKED.fullmatch(name):
                for layer in range(entry.size[0]):
                    self._places[layer_tensor(layer, match[1])] = (key, entry, layer)
            else:
                self._places[name] = (key, entry, None)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._start.tokenizer

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The full tensor of a canonical Megatron name in the dtype that the run trained in; ValueError for others."""
        if name not in self._places:
            raise ValueError(f"{name}: the checkpoint {self._reader.path} has no such tensor")
        key, entry, layer = self._places[name]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        full = torch.empty(sizes, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        self._reader.read_data(LoadPlan(items), _Into(full))
        if layer is not None:
            full = full[0]
        return full[: self.vocab_size] if name in VOCABULARY_TENSORS else full


class _Into:
    """What a storage reader asks of a planner, for one tensor to read into."""

    def __init__(self, full: torch.Tensor):
        self._full = full

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        part = self._full
        for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor is a view."""


def newest_intact(path: Path) -> Path:
    """The checkpoint ``path``, or the newest intact one of a run's directory; every file is compared with its checksum.

    Raises:
        ValueError: there is none.
    """
    problems: list[str] = []
    for found in checkpoint.find(path):
        for problem in problems[-1:]:
            warnings.warn(f"checkpoint left out: {problem}", stacklevel=2)
        problem = checkpoint.damage(found, 0, 1)
        if problem is None:
            return found
        problems.append(problem)
    raise ValueError(f"no intact checkpoint: {'; '.join(problems)} (name another one)")
