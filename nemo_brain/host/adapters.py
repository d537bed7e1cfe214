"""NeMo's LoRA matrices for a linear layer of Megatron's, with Transformer Engine and without."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear

from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE


def make_adapter(linear: Any, name: str, dim: int, alpha: int) -> ParallelLinearAdapter:
    """What NeMo's ``LoRA.transform`` builds for a parallel layer of this name.

    Itself it compares the layer with Transformer Engine's classes, and raises where there are none; so does the
    function that describes the layer.
    """
    if HAVE_TRANSFORMER_ENGINE:
        row_parallel, inputs, outputs, no_gather, parallel = get_adapter_attributes_from_linear(linear)
    else:
        row_parallel, parallel = isinstance(linear, RowParallelLinear), True
        inputs, outputs, no_gather = linear.input_size, linear.output_size, not linear.config.sequence_parallel
    return ParallelLinearAdapter(
        inputs,
        outputs,
        dim,
        # By this name NeMo's checkpoints take B for [gate; up]. Where there is no gate that would permute its rows as
        # soon as another tensor-parallel size reads them.
        base_linear_name=name if linear.config.gated_linear_unit else "",
        activation="identity",
        input_is_parallel=row_parallel,
        model_parallel_config=linear.config,
        alpha=alpha,
        disable_sequence_parallel_comm=no_gather,
        base_linear_is_parallel=parallel,
    )
