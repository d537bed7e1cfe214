"""What all architectures say about a GPT in the same words: activations, and fields with one known value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

# Fields for which every architecture here knows one value only, of those that our layers compute with others too. A
# checkpoint sets them, so that no option of a run can change what its model computes; an exported model must have them.
PLAIN = {
    "layernorm_zero_centered_gamma": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "softmax_scale": None,
}


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU approximated by tanh: what transformers calls gelu_new, gelu_fast and gelu_pytorch_tanh."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
}


def activation_fields(kind: str, key: str, name: str) -> dict:
    """The fields of transformers' activation ``name``, the value of ``key``. Raises ValueError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{kind}: {key}={name!r} is not supported, only {', '.join(ACTIVATIONS)}")
    fields: dict[str, Any] = {"activation_func": ACTIVATIONS[name]}
    if name == "gelu":
        fields["bias_activation_fusion"] = False  # Megatron's fused kernels approximate it by tanh
    return fields


def activation_name(kind: str, gpt: Any) -> str:
    """transformers' name of a model's activation. Raises ValueError where it has none."""
    function = gpt.activation_func
    if function is F.gelu and gpt.bias_activation_fusion:
        function = gelu_tanh
    name = next((name for name, known in ACTIVATIONS.items() if known is function), None)
    if name is None:
        described = getattr(function, "__name__", function)
        raise ValueError(f"{kind} cannot express activation_func={described}, only {', '.join(ACTIVATIONS)}")
    return name


def require(kind: str, model: Any, values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first field of a model with another value."""
    for key, value in values.items():
        if getattr(model, key, value) != value:
            raise ValueError(f"{kind} cannot express {key}={getattr(model, key)!r}, only {value!r}")


def refuse(kind: str, config: Any, values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first key of a checkpoint's configuration that has another value."""
    for key, value in values.items():
        if getattr(config, key, value) != value:
            raise ValueError(f"{kind}: {key}={getattr(config, key)!r} is not supported, only {value!r}")
