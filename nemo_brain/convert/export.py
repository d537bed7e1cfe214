"""A model as a Hugging Face directory: gathered tensor by tensor, written shard by shard, put in place at once.

Adapters are merged into the weights that they belong to; ``adapter.py`` writes them by themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from nemo_brain.convert.gpt2 import GPT2Export
from nemo_brain.convert.gpt_neox import GPTNeoXExport
from nemo_brain.convert.llama import LlamaExport
from nemo_brain.convert.mapping import MappedExport
from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.lora import merged_parameters
from nemo_brain.model.parameters import VOCABULARY_TENSORS, GlobalParameter, unwrap

MAX_SHARD_BYTES = 5 * 10**9  # what one safetensors file holds, and what rank 0 holds in host memory
MARK = ".nemo_brain_export"  # only a directory with this file is ever replaced


class Export(Protocol):
    """A Megatron GPT in Hugging Face's terms; ``vocab_size`` counts no padding, ``generation_config`` is
    generation_config.json's content."""

    config: PretrainedConfig
    generation_config: dict[str, Any]
    vocab_size: int
    tokenizer: PreTrainedTokenizerFast

    def tensors(self, name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face's names and tensors of the full tensor of a canonical Megatron name (see ``sharding``)."""


# The first that can express a model exports it.
EXPORTS: tuple[Callable[..., MappedExport], ...] = (LlamaExport, GPTNeoXExport, GPT2Export)


def make_export(
    gpt: PackedGPTConfig,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerFast,
    key: str,
    generation_config: Mapping[str, Any] | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> MappedExport:
    """How a model is written.

    Args:
        gpt: the model's configuration.
        vocab_size: rows of the embedding, without padding.
        tokenizer: written beside the weights.
        key: the configuration key that errors name.
        generation_config: what generation_config.json says besides; None: nothing.
        stop_token_ids: what it says ends an output; None: the tokenizer's end token.

    Raises:
        ValueError: no architecture here computes what the model computes; says what cannot be expressed.
    """
    refusals = []
    for kind in EXPORTS:
        try:
            export = kind(gpt, vocab_size, tokenizer)
        except ValueError as error:
            refusals.append(str(error))
            continue
        export.state_generation(generation_config or {}, stop_token_ids)
        return export
    raise ValueError(
        f"{key}: no Hugging Face architecture known here computes what this model computes: {'; '.join(refusals)}. "
        f"Change the model, or set {key}=null"
    )


def check_target(directory: str | Path, key: str) -> None:
    """Raises ValueError unless ``directory`` is free, empty or an earlier export: nothing else is overwritten."""
    directory = Path(directory)
    if directory.exists() and not (directory / MARK).is_file() and (directory.is_file() or any(directory.iterdir())):
        raise ValueError(
            f"{key}: {directory} exists and is not an earlier export: name another directory, or remove it"
        )


def export_model(
    chunks: Sequence[torch.nn.Module],
    export: Export,
    directory: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Writes the model to ``directory``, in the parameters' own dtype: what transformers and inference servers load.

    A collective of all ranks. The ranks of the first data-parallel replica gather, rank 0 writes, the others wait. No
    rank holds more than one full tensor beside its shards (a few where an adapter is merged), rank 0 one file's worth
    of them. The directory is written under another name beside its place and then renamed; an earlier export there is
    there in full until that moment.

    Args:
        chunks: this rank's chunks, wrapped (DDP, Float16Module) or not; an overlapped gather of the weights has ended.
        export: see ``make_export``.
        directory: on a file system that rank 0 writes to.
        max_shard_bytes: the largest safetensors file, except that a larger tensor has one to itself.

    Returns:
        The bytes of its tensors, on rank 0; 0 on others.

    Raises:
        OSError: on every rank, when rank 0 could not write; an earlier export is unharmed.
        ValueError: on every rank, when ``directory`` exists and is not an earlier export.
    """
    writer = Writer(export, Path(directory), max_shard_bytes) if dist.get_rank() == 0 else None
    write_parameters([p for chunk in chunks for p in merged_parameters(unwrap(chunk))], writer)
    return writer.total_bytes if writer else 0


@torch.no_grad()
def gathered_tensors(
    chunks: Sequence[torch.nn.Module], export: Export, adapted: bool = False, everywhere: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model by Hugging Face's names, in the parameters' own dtype, one full tensor at a time, on the first rank of
    the replica; its other ranks yield nothing.

    A collective of one replica's ranks, who have to come to its end.

    Args:
        chunks, export: as in ``export_model``.
        adapted: only the layers that have adapters.
        everywhere: on all ranks of the replica.
    """
    mine = [p for chunk in chunks for p in merged_parameters(unwrap(chunk), adapted)]
    for name, full in _full_tensors(mine, everywhere):
        yield from _exported(export, name, full)


def _exported(export: Export, name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's names and tensors of the full tensor of a canonical name, without padding."""
    return export.tensors(name, full[: export.vocab_size] if name in VOCABULARY_TENSORS else full)


@torch.no_grad()
def write_parameters(mine: Sequence[GlobalParameter], writer: DirectoryWriter | None) -> None:
    """Gives the full tensors of all ranks' parameters to rank 0's writer. A collective of all ranks; raises as
    ``export_model``."""
    if parallel_state.get_data_parallel_rank() == 0:
        for name, full in _full_tensors(mine):
            assert writer is not None  # _full_tensors yields on rank 0 alone
            writer.attempt(writer.add, name, full)
    if writer:
        writer.attempt(writer.finish)
    outcome = [writer.error if writer else None]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        kind, message = outcome[0]
        raise kind(message)


def _full_tensors(mine: Sequence[GlobalParameter], everywhere: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of all ranks once, by canonical name, on the replica's first rank, or ``everywhere`` in the replica;
    otherwise the others yield nothing.

    A collective of one replica's ranks.
    """
    replica = parallel_state.get_model_parallel_group()
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks, stage = dist.get_process_group_ranks(group), group.rank()
    first_shard = parallel_state.get_tensor_model_parallel_rank() == 0
    stages: list = [None] * group.size()
    dist.all_gather_object(stages, [(p.name, p.global_shape, p.parameter.dtype) for p in mine], group=group)
    seen = set()
    for owner, parameters in enumerate(stages):
        for index, (name, shape, dtype) in enumerate(parameters):
            heartbeat()
            if name in seen:  # the last stage's copy of a tied embedding
                continue
            seen.add(name)
            full: Any = None
            if stage == owner:
                full = mine[index].full()
                if first_shard and stage > 0:
                    dist.send(full.contiguous(), ranks[0], group=group)
            elif first_shard and stage == 0:
                full = torch.empty(shape, dtype=dtype, device=mine[0].parameter.device)
                dist.recv(full, ranks[owner], group=group)
            if everywhere and replica.size() > 1:
                full = torch.empty(shape, dtype=dtype, device=mine[0].parameter.device) if full is None else full
                dist.broadcast(full, dist.get_process_group_ranks(replica)[0], group=replica)
            if everywhere or (first_shard and stage == 0):
                yield name, full


class DirectoryWriter:
    """What rank 0 does: writes to ``_incomplete`` what it is given, then puts it in the directory's place.

    An error is kept in ``error`` (its type and message) and ends the writing, not the gathering: the other ranks would
    wait for ever. ``replaceable``: a later export may take the directory's place.
    """

    def __init__(self, directory: Path, replaceable: bool = True):
        self.error: tuple[type[Exception], str] | None = None
        self._replaceable = replaceable
        self._directory = directory.resolve()
        self._incomplete = self._beside("incomplete")
        self._tensors: dict[str, torch.Tensor] = {}  # in memory, not yet in a file
        self.attempt(self._start)

    def add(self, name: str, full: torch.Tensor) -> None:
        """Takes the full tensor of a canonical name."""
        raise NotImplementedError

    def write_rest(self) -> None:
        """Writes what is not yet in a file, among it a JSON file."""
        raise NotImplementedError

    def attempt(self, work: Callable, *args: Any) -> None:
        """Runs ``work``, unless something has failed before."""
        if self.error is not None:
            return
        try:
            work(*args)
        except ValueError as error:
            self.error = (ValueError, str(error))
        except KeyboardInterrupt:
            shutil.rmtree(self._incomplete, ignore_errors=True)
            raise
        except Exception as error:  # whatever it is, every rank must be told
            described = f"{type(error).__name__}: {error}"
            self.error = (OSError, f"the export to {self._directory} failed, nothing there has changed: {described}")
        if self.error is not None:
            self._tensors.clear()
            shutil.rmtree(self._incomplete, ignore_errors=True)

    def finish(self) -> None:
        self.write_rest()
        for file in self._incomplete.glob("*.safetensors"):
            # They are written for their owner alone, but an inference server may be another user.
            shutil.copymode(next(self._incomplete.glob("*.json")), file)
        if self._replaceable:
            (self._incomplete / MARK).write_text(
                "Written by nemo_brain, which replaces this directory at its next export.\n"
            )
        if self._directory.exists():
            previous = self._beside("previous")
            shutil.rmtree(previous, ignore_errors=True)
            self._directory.rename(previous)
            self._incomplete.rename(self._directory)
            shutil.rmtree(previous)
        else:
            self._incomplete.rename(self._directory)

    def _start(self) -> None:
        check_target(self._directory, "export")
        shutil.rmtree(self._incomplete, ignore_errors=True)
        self._incomplete.mkdir(parents=True)

    def _beside(self, what: str) -> Path:
        return self._directory.with_name(f".{self._directory.name}.{what}")


class Writer(DirectoryWriter):
    """Writes a model, file by file; see ``export_model``."""

    def __init__(self, export: Export, directory: Path, max_shard_bytes: int, replaceable: bool = True):
        self.tensors = self.total_bytes = 0  # written so far
        self._export = export
        self._max_shard_bytes = max_shard_bytes
        self._shard_bytes = 0
        self._files: list[list[str]] = []  # the names in each file
        super().__init__(directory, replaceable)

    def add(self, name: str, full: torch.Tensor) -> None:
        if name in VOCABULARY_TENSORS:
            self._export.config.torch_dtype = full.dtype
        for theirs, tensor in _exported(self._export, name, full):
            tensor = tensor.cpu().contiguous()
            size = tensor.numel() * tensor.element_size()
            if self._tensors and self._shard_bytes + size > self._max_shard_bytes:
                self._flush()
            self._tensors[theirs] = tensor
            self._shard_bytes += size

    def write_rest(self) -> None:
        self._flush()
        self._name_files()
        self._export.config.save_pretrained(self._incomplete)
        # Not by transformers' class, which refuses to write what some models come with.
        generation = json.dumps(self._export.generation_config, indent=2, ensure_ascii=False)
        (self._incomplete / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        self._export.tokenizer.save_pretrained(self._incomplete)

    def _flush(self) -> None:
        file = self._incomplete / f"{len(self._files)}.safetensors"
        save_file(self._tensors, file, metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self.tensors += len(self._tensors)
        self.total_bytes += self._shard_bytes
        self._tensors.clear()
        self._shard_bytes = 0

    def _name_files(self) -> None:
        """transformers' names; they hold the number of files, which is known at the end only."""
        if len(self._files) == 1:
            (self._incomplete / "0.safetensors").rename(self._incomplete / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            (self._incomplete / f"{number}.safetensors").rename(self._incomplete / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._incomplete / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
