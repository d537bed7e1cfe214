"""What fills a Megatron GPT's shards: one full tensor at a time, by canonical name.

The weights come from the converter (``convert.open``), from a seed (``random_weights``), or with adapters (``lora``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import PreTrainedTokenizerFast

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.model.parameters import VOCABULARY_TENSORS, global_parameters


class Tensors(Protocol):
    """``vocab_size``: rows of the embedding, without padding."""

    vocab_size: int

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The full tensor of a canonical Megatron name (see ``sharding``) on the CPU.

        ``shape`` is what the model wants: the global shape, with ``vocab_size`` rows where rows are tokens.
        """


class Weights(Tensors, Protocol):
    """All that is needed to build a Megatron GPT and fill it.

    gpt_config: values for fields of ``PackedGPTConfig``; generation_config: what generation_config.json says, {}
    without one.
    """

    gpt_config: dict
    generation_config: dict

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end its outputs, the tokenizer's own first."""


@torch.no_grad()
def load_weights(chunks: Sequence[GPTModel], weights: Tensors) -> None:
    """Copies this rank's shards of ``weights`` into the unwrapped chunks, casting to the parameters' dtype.

    One full tensor is held at a time. Rows that pad the vocabulary become zero. Call it before the optimizer is built:
    Megatron's keeps its own copies of the parameters.

    Raises:
        ValueError: on the ranks concerned, when the weights lack a tensor of the model, or it has another shape, or is
            refused by ``weights``; names it. No collective: of virtual stages, which wait for each other while they are
            built, one may be filled before another exists.
    """
    for chunk in chunks:
        for parameter in global_parameters(chunk):
            heartbeat()
            shape = parameter.global_shape
            padding = 0
            if parameter.name in VOCABULARY_TENSORS:
                padding = shape[0] - weights.vocab_size
                shape = (weights.vocab_size, *shape[1:])
            full = weights.tensor(parameter.name, shape)
            if tuple(full.shape) != shape or padding < 0:
                raise ValueError(
                    f"{parameter.name}: the weights have shape {tuple(full.shape)}, the model {parameter.global_shape}"
                )
            if padding:
                full = torch.cat([full, full.new_zeros(padding, *shape[1:])])
            parameter.parameter.copy_(parameter.shard(full))
