"""Which of Hugging Face's tensors make up which of Megatron's, and how; architectures are tables of ``Module``.

Shapes: G query groups, R query heads per group, D channels per head, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Values
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from nemo_brain.data.stop import named_token_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_brain.convert.source import CheckpointSource

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Heads:
    """How a layer's query, key and value heads are counted."""

    groups: int
    per_group: int  # query heads
    channels: int

    @property
    def rows(self) -> list[int]:
        """Rows of all queries, keys and values."""
        keys = self.groups * self.channels
        return [keys * self.per_group, keys, keys]

    def interleave(self, full: torch.Tensor) -> torch.Tensor:
        """[queries; keys; values] in Megatron's order, group by group: [G*(R+2)*D, ...]."""
        split = [part.reshape(self.groups, -1, self.channels, *part.shape[1:]) for part in full.split(self.rows)]
        return torch.cat(split, dim=1).flatten(0, 2)

    def separate(self, full: torch.Tensor) -> torch.Tensor:
        """The inverse of ``interleave``."""
        split = full.view(self.groups, self.per_group + 2, self.channels, *full.shape[1:])
        return torch.cat([part.flatten(0, 2) for part in split.split([self.per_group, 1, 1], dim=1)])


@dataclass(frozen=True)
class Module:
    """One of Megatron's modules: the parts whose rows lie in it one after another, by Hugging Face's names.

    ``bias``: it has one beside its weight. ``transposed``: Hugging Face keeps matrices as [in, out]. ``heads``: the
    rows are queries, keys and values, which Megatron interleaves; they come in three parts or in one.
    """

    parts: tuple[str, ...]
    bias: bool = False
    transposed: bool = False
    heads: Heads | None = None

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Megatron's tensor. Raises ValueError for heads that are not as many as the configuration says."""
        tensors = [self._turn(tensor) for tensor in tensors]
        full = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.heads is None:
            return full
        found, rows = [len(tensor) for tensor in tensors], self._rows(len(full))
        if found != rows:
            raise ValueError(f"queries, keys and values have {found} rows, config.json implies {rows}")
        return self.heads.interleave(full)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Hugging Face's tensors."""
        return [self._turn(part) for part in self.split_rows(full)]

    def split_rows(self, full: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each part, whatever the columns are, as [out, ...]."""
        if self.heads is not None:
            full = self.heads.separate(full)
        return list(full.split(self._rows(len(full))))

    def _rows(self, total: int) -> list[int]:
        if self.heads is None:
            return [total // len(self.parts)] * len(self.parts)
        return self.heads.rows if len(self.parts) == 3 else [sum(self.heads.rows)]

    def _turn(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mT if self.transposed and tensor.dim() == 2 else tensor


@dataclass(frozen=True)
class Mapping:
    """A model's modules outside of the layers and in each of ``layers`` layers, by Megatron's names.

    ``layer_prefix``: what precedes the number of a layer in Hugging Face's names.
    """

    outside: dict[str, Module]
    inside: dict[str, Module]
    layer_prefix: str
    layers: int

    @property
    def names(self) -> list[str]:
        """All canonical Megatron names (see ``sharding``)."""
        modules = dict(self.outside)
        for layer in range(self.layers):
            modules |= {f"decoder.layers.{layer}.{name}": module for name, module in self.inside.items()}
        kinds = {False: ("weight",), True: ("weight", "bias")}
        return [f"{name}.{kind}" for name, module in modules.items() for kind in kinds[module.bias]]

    def find(self, name: str) -> tuple[Module, list[str]] | None:
        """The module of a canonical name and Hugging Face's names of its parts; None for other names."""
        module_name, _, kind = name.rpartition(".")
        prefix, table = "", self.outside
        if match := _LAYER_NAME.fullmatch(module_name):
            if int(match[1]) >= self.layers:
                return None
            prefix, table, module_name = f"{self.layer_prefix}{match[1]}.", self.inside, match[2]
        module = table.get(module_name)
        if module is None or kind not in (("weight", "bias") if module.bias else ("weight",)):
            return None
        return module, [f"{prefix}{part}.{kind}" for part in module.parts]

    def parts(self, name: str) -> tuple[Module, list[str]]:
        """As ``find``, for a name that the architecture has."""
        found = self.find(name)
        assert found is not None, name
        return found


class MappedWeights:
    """``Weights`` of a checkpoint that a ``Mapping`` describes.

    Args:
        kind: the architecture, for errors.
        gpt_config: fields of ``PackedGPTConfig``.
        unused: endings of tensors that are computed from the configuration, or masks.

    Raises ValueError where the checkpoint lacks a tensor, or holds one that has no place in the model.
    """

    def __init__(
        self,
        kind: str,
        source: CheckpointSource,
        mapping: Mapping,
        gpt_config: dict,
        vocab_size: int,
        unused: tuple[str, ...],
    ):
        self.kind = kind
        self.source = source
        self.mapping = mapping
        self.gpt_config = gpt_config
        self.vocab_size = vocab_size
        self.generation_config = source.generation_config
        expected = {part for name in mapping.names for part in mapping.parts(name)[1]}
        names = set(source.names)
        if missing := sorted(expected - names):
            raise ValueError(f"{kind}: the checkpoint lacks {len(missing)} tensors, the first {missing[0]}")
        if extra := {name for name in names - expected if not name.endswith(unused)}:
            raise ValueError(f"{kind}: {len(extra)} tensors have no place in the model, the first {min(extra)}")

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.source.tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return named_token_ids(self.tokenizer, self.generation_config, self.source.config)

    @property
    def names(self) -> list[str]:
        return self.mapping.names

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The full tensor of a canonical Megatron name in the checkpoint's dtype; ValueError for other names."""
        found = self.mapping.find(name)
        if found is None:
            raise ValueError(f"{name}: a {self.kind} checkpoint of {self.mapping.layers} layers has no such tensor")
        module, parts = found
        try:
            return module.join([self.source.tensor(part) for part in parts])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


class MappedExport:
    """``Export`` of a model that a ``Mapping`` describes."""

    def __init__(self, config: PretrainedConfig, mapping: Mapping, vocab_size: int, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.mapping = mapping
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.generation_config: dict[str, Any] = {}

    def state_generation(self, given: Values[str, Any], stop_token_ids: Sequence[int] | None) -> None:
        """Says in both configurations which tokens end an output (None: the tokenizer's end token), and in
        generation_config.json what is ``given`` besides."""
        own = self.tokenizer.eos_token_id
        ends = list(stop_token_ids) if stop_token_ids is not None else [] if own is None else [own]
        end = ends if len(ends) > 1 else next(iter(ends), None)
        tokens = {"bos_token_id": self.tokenizer.bos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        stated = {**tokens, **given, "eos_token_id": end, "transformers_version": transformers.__version__}
        self.generation_config = {name: value for name, value in stated.items() if value is not None}
        self.config.eos_token_id = end

    def tensors(self, name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face's names and tensors of one canonical Megatron tensor, without rows that pad the vocabulary."""
        module, parts = self.mapping.parts(name)
        yield from zip(parts, module.split(full), strict=True)
