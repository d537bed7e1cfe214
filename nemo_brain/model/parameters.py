"""The parameters of one Megatron GPT chunk under names and shapes that do not depend on the parallel layout.

Names are those of Megatron's local layer spec, layers counted from 0 over all pipeline stages. Transformer Engine's
fused layer norms and the last stage's copy of a tied embedding answer to the name of the one tensor that they hold. The
matrices of a layer's adapter (see ``lora``) are its ``adapter.linear_in.weight`` and ``adapter.linear_out.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

# The tensors with one row per token of the vocabulary; Megatron pads them to a multiple of the tensor-parallel size.
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GlobalParameter:
    """One parameter of this rank and the full tensor that it is a shard of.

    ``global_shape`` counts the padded rows of the vocabulary. ``partition_dim`` is None for a tensor that every
    tensor-parallel rank holds in full. ``gated``: the full tensor is [gate; up] and each rank holds [gate_r; up_r].
    """

    name: str
    parameter: torch.nn.Parameter
    global_shape: tuple[int, ...]
    partition_dim: int | None
    gated: bool

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's part of a tensor of ``global_shape``."""
        if self.partition_dim is None:
            return full
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        halves = full.chunk(2, self.partition_dim) if self.gated else (full,)
        return torch.cat([half.chunk(size, self.partition_dim)[rank] for half in halves], self.partition_dim)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The full tensor from every rank's tensor of the parameter's local shape (the weight, its gradient, ...).

        A collective of the tensor-parallel group; a replicated tensor is returned as it is.
        """
        size = parallel_state.get_tensor_model_parallel_world_size()
        if self.partition_dim is None or size == 1:
            return local
        shards = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
        torch.distributed.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        if self.gated:
            halves = zip(*(shard.chunk(2, self.partition_dim) for shard in shards), strict=True)
            shards = [piece for half in halves for piece in half]
        return torch.cat(shards, self.partition_dim)

    def full(self) -> torch.Tensor:
        """The full tensor; a collective as ``gather``."""
        return self.gather(self.parameter.data)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter; also for the keys of a checkpoint."""
    return ".adapter." in name


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPT inside what Megatron's schedules take (DDP, Float16Module)."""
    inner: Any = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def global_parameters(chunk: GPTModel) -> Iterator[GlobalParameter]:
    """Every parameter of an unwrapped chunk: one pipeline stage or virtual stage of any tensor-parallel rank.

    The chunk must have been built with ``perform_initialization`` (Megatron's default): only then does Megatron mark on
    the parameters how they are split.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    for local_name, parameter in chunk.named_parameters():
        name = _global_name(chunk, local_name)
        split = getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if split else None
        shape = tuple(length * size if index == dim else length for index, length in enumerate(parameter.shape))
        gated = ".mlp.linear_fc1." in name and chunk.config.gated_linear_unit and not name.endswith("linear_in.weight")
        yield GlobalParameter(name, parameter, shape, dim, gated)


def _global_name(chunk: GPTModel, name: str) -> str:
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    index, rest = match.groups()
    rest = rest.replace(".to_wrap.", ".")  # what has an adapter is wrapped
    return layer_tensor(chunk.decoder.layers[int(index)].layer_number - 1, rest)


def layer_tensor(layer: int, name: str) -> str:
    """The canonical name of one of a layer's tensors; ``layer``: counted from 0 over all pipeline stages."""
    for fused, separate in _FUSED_NORMS.items():
        if name.startswith(fused):
            name = separate + name.removeprefix(fused)
    return f"decoder.layers.{layer}.{name}"
