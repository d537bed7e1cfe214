"""LoRA: NeMo's adapters beside the linear layers of a Megatron GPT, whose own weights stay as they are.

With an adapter a layer computes W x + (alpha / dim) B A x. A, [dim, in], starts at random, B, [out, dim], at zero: the
start model is the model as it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from nemo.collections.llm.peft.lora import LoRALinear

from nemo_brain.host.adapters import make_adapter
from nemo_brain.model.parameters import GlobalParameter, global_parameters, is_adapter
from nemo_brain.model.random_weights import normal
from nemo_brain.model.weights import Tensors, load_weights


@dataclass(frozen=True)
class LoRA:
    """``model.peft``, and the seed that A is drawn from."""

    dim: int
    alpha: int
    target_modules: tuple[str, ...]
    seed: int


class SwitchedLoRALinear(LoRALinear):
    """NeMo's LoRALinear. Switched off it is the layer that it wraps, to the last bit."""

    on = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.on:
            return super().forward(x, *args, **kwargs)
        output, bias, _ = self.base_linear_forward(x, *args, **kwargs)
        return output, bias


def load(chunk: GPTModel, weights: Tensors, lora: LoRA | None) -> None:
    """Fills a new, unwrapped chunk; with ``lora`` it is frozen then, and has adapters, which are all that trains."""
    if lora is not None:
        chunk.requires_grad_(False)
        for layer in chunk.decoder.layers:
            for owner in (layer.self_attention, layer.mlp):
                for name in lora.target_modules:
                    if hasattr(owner, name):
                        linear = getattr(owner, name)
                        adapter = make_adapter(linear, name, lora.dim, lora.alpha)
                        setattr(owner, name, SwitchedLoRALinear(linear, adapter))
        weights = _WithAdapters(weights, lora.seed)
    load_weights([chunk], weights)


class _WithAdapters:
    """``Tensors`` of a model with new adapters: A is normal with Xavier's deviation, as NeMo's, but drawn by seed and
    name, so that it is the same in every layout; B is zero."""

    def __init__(self, weights: Tensors, seed: int):
        self.weights, self.seed = weights, seed
        self.vocab_size = weights.vocab_size

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if not is_adapter(name):
            return self.weights.tensor(name, shape)
        if name.endswith("linear_out.weight"):
            return torch.zeros(shape)
        return math.sqrt(2 / sum(shape)) * normal(self.seed, name, shape)


@contextlib.contextmanager
def switched_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While the context lasts, the chunks (wrapped or not) are the model without its adapters."""
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, SwitchedLoRALinear)]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def merged_parameters(chunk: GPTModel, adapted: bool = False) -> Iterator[GlobalParameter]:
    """The parameters of an unwrapped chunk but for the adapters', which are part of the ``full`` tensors instead.

    Args:
        adapted: only those of layers that have an adapter, their biases included: all others are as they were.
    """
    parameters = {id(parameter.parameter): parameter for parameter in global_parameters(chunk)}
    adapters = {id(layer.to_wrap.weight): layer.adapter for layer in chunk.modules() if isinstance(layer, LoRALinear)}
    modules = {_module(parameters[key].name) for key in adapters}
    for key, parameter in parameters.items():
        if adapted and _module(parameter.name) not in modules:
            continue
        if key in adapters:
            adapter = adapters[key]
            a, b = (parameters[id(linear.weight)] for linear in (adapter.linear_in, adapter.linear_out))
            yield _Merged(**vars(parameter), a=a, b=b, scale=adapter.alpha / adapter.dim)
        elif not is_adapter(parameter.name):
            yield parameter


def _module(name: str) -> str:
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class _Merged(GlobalParameter):
    """A weight with its adapter; ``parameter`` is the weight without."""

    a: GlobalParameter
    b: GlobalParameter
    scale: float

    def full(self) -> torch.Tensor:
        """W + (alpha / dim) B A, computed in fp32 and rounded once."""
        weight = super().full()
        return weight.float().addmm(self.b.full().float(), self.a.full().float(), alpha=self.scale).to(weight.dtype)
