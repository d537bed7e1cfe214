"""The transformer layer of GPT-NeoX: attention and MLP both read the layer's input; their outputs are added to it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm'(x)), in the modules and under the names of Megatron's own layer.

    What Megatron's layer can recompute apart from attention it does not: ``fields`` refuses that.

    Megatron-core has no such layer, and the attention half of its own, which adds x, is a private method.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer's: (hidden states, context)."""
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        out_and_bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        with self.bias_dropout_add_exec_handler():
            add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            out = add(out_and_bias, attended, self.hidden_dropout)
        # The checkpoint of recomputed layers refuses views.
        return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True), context
