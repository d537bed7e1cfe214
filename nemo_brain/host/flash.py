"""torch's flash attention for sequences of several lengths, by the operations behind ``torch.nn.attention.varlen``.

That one's own backward pass takes no other output and log-sums than its own.

Shapes: S queries of all sequences, M keys, H query heads, K key-value heads, D head width, N sequences.
"""

from __future__ import annotations

import torch

# (query_ends, key_ends, longest_query, longest_key): where sequences end, int32 [N + 1], and the longest.
Sizes = tuple[torch.Tensor, torch.Tensor, int, int]


def varlen_forward(
    q_SHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, sizes: Sizes, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [S, H, D], and the log-sums of exponentials [H, S] in float32."""
    forward = torch.ops.aten._flash_attention_forward
    out_SHD, lse_HS, *_ = forward(q_SHD, k_MKD, v_MKD, *sizes, 0.0, causal, False, scale=scale)
    return out_SHD, lse_HS


def varlen_backward(
    d_out_SHD: torch.Tensor,
    q_SHD: torch.Tensor,
    k_MKD: torch.Tensor,
    v_MKD: torch.Tensor,
    out_SHD: torch.Tensor,
    lse_HS: torch.Tensor,
    sizes: Sizes,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values, for this output and these log-sums."""
    none = torch.zeros(2, dtype=torch.uint64, device=q_SHD.device)  # the state of a dropout that there is not
    backward = torch.ops.aten._flash_attention_backward
    given = (d_out_SHD, q_SHD, k_MKD, v_MKD, out_SHD, lse_HS.contiguous())
    return backward(*given, *sizes, 0.0, causal, none, none, scale=scale)
