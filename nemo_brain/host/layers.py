"""Megatron's transformer layers: Transformer Engine's where it is installed, Megatron-core's own otherwise."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_brain.host.parallel_residual import ParallelResidualLayer

# Asked here: NeMo's and Megatron's own flags differ from module to module, and some are true without it.
try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False


_MARK = "sequence_parallel"  # the attribute that Megatron looks for on a parameter


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm without Apex or Transformer Engine, also under sequence parallelism.

    Megatron-core's own torch norm refuses sequence parallelism; all it takes is the mark on the weights, by which their
    gradients are summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, _MARK, config.sequence_parallel)
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
            setattr(self.bias, _MARK, config.sequence_parallel)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.zero_centered:
            return self._normalized(hidden, self.weight, self.bias)
        # In fp32: in bfloat16 the sum would round small weights away.
        bias = None if self.bias is None else self.bias.float()
        return self._normalized(hidden.float(), 1 + self.weight.float(), bias).type_as(hidden)

    def _normalized(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if bias is None:
            return torch.nn.functional.rms_norm(hidden, (self.hidden_size,), weight, self.eps)
        return torch.nn.functional.layer_norm(hidden, (self.hidden_size,), weight, bias, self.eps)


def block_spec(config: TransformerConfig, core_attention: type, parallel_residual: bool, vp_stage: int | None) -> Any:
    """Megatron's spec of a (virtual) stage's layers.

    The functions that make specs, what they take, and the places in a spec change with Megatron-core's versions.

    Args:
        core_attention: the module that attends, in place of theirs.
        parallel_residual: layers are ``ParallelResidualLayer``.
    """
    if HAVE_TRANSFORMER_ENGINE:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = core_attention
    if parallel_residual:
        spec.module = ParallelResidualLayer
    if HAVE_TRANSFORMER_ENGINE:
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm)
