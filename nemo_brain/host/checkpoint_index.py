"""The model's tensors in one of Megatron's distributed checkpoints, read in one process and without Megatron.

What the index (torch.distributed.checkpoint's ``.metadata``, a pickle) names, and the keys under which NeMo and
Megatron store a model, belong to their versions.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

# What the index may name: data, nothing that runs.
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": None,  # every class of it
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"},
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "pathlib": {"PosixPath", "Path"},
}
_MODEL = "module."  # what precedes the model's tensors in the checkpoint; the optimizer's have another beginning
_STACKED = re.compile(r"decoder\.layers\.(\D.*)")  # Megatron keeps the same tensor of all layers as one


class _Index(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's index, and nothing that names anything but its classes."""

    def find_class(self, module: str, name: str) -> Any:
        names = _INDEX_NAMES.get(module, ())
        if names is None or name in names:
            return super().find_class(module, name)
        raise ValueError(f"weights/.metadata names {module}.{name}, which no checkpoint's index does")


def read_index(weights: Path) -> Metadata:
    """The index of a checkpoint's ``weights``. ValueError where it is damaged, or names what no index does."""
    with (weights / ".metadata").open("rb") as file:
        try:
            return _Index(file).load()
        except (pickle.UnpicklingError, EOFError, IndexError, AttributeError, ImportError) as error:
            raise ValueError(f"weights/.metadata is damaged: {error}") from None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model in a checkpoint: ``name`` within its ``layer`` (counted from 0), or within the model."""

    name: str
    layer: int | None
    key: str
    entry: TensorStorageMetadata


class ModelReader:
    """The model of a checkpoint's ``weights``; ValueError as in ``read_index``."""

    def __init__(self, weights: Path):
        self._index = read_index(weights)
        self._reader = FileSystemReader(weights)
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)

    def tensors(self) -> Iterator[StoredTensor]:
        for key, entry in self._index.state_dict_metadata.items():
            if not key.startswith(_MODEL) or not isinstance(entry, TensorStorageMetadata):
                continue
            name = key.removeprefix(_MODEL)
            if match := _STACKED.fullmatch(name):
                for layer in range(entry.size[0]):
                    yield StoredTensor(match[1], layer, key, entry)
            else:
                yield StoredTensor(name, None, key, entry)

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """The full tensor in its stored dtype."""
        offsets, sizes = [0] * len(stored.entry.size), list(stored.entry.size)
        if stored.layer is not None:
            offsets[0], sizes[0] = stored.layer, 1
        full = torch.empty(sizes, dtype=stored.entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(stored.key, stored.entry, [wanted])
        planner: Any = _Into(full)
        self._reader.read_data(LoadPlan(items), planner)
        return full if stored.layer is None else full[0]


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
