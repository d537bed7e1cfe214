"""torch's flash attention for sequences of several lengths, by the operations behind ``torch.nn.attention.varlen``.

That one's own backward pass takes no other output and log-sums than its own.

Shapes: S queries of all sequences, M keys, H query heads, K key-value heads, D head width, N sequences.
"""

from __future__ import annotations

import functools

import torch


class FlashKernel:
    """Variable-length attention, causal or not. ``lengths``: where sequences end among queries and keys, int32 [N + 1]
    both, and the longest of each."""

    def forward(
        self,
        q_SHD: torch.Tensor,
        k_MKD: torch.Tensor,
        v_MKD: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor, int, int],
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [S, H, D], and the log-sums of exponentials [H, S] in float32."""
        forward = torch.ops.aten._flash_attention_forward
        out_SHD, lse_HS, *_ = forward(q_SHD, k_MKD, v_MKD, *lengths, 0.0, causal, False, scale=scale)
        return out_SHD, lse_HS

    def backward(
        self,
        d_out_SHD: torch.Tensor,
        q_SHD: torch.Tensor,
        k_MKD: torch.Tensor,
        v_MKD: torch.Tensor,
        out_SHD: torch.Tensor,
        lse_HS: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor, int, int],
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of queries, keys and values, for this output and these log-sums."""
        none = _no_dropout(q_SHD.device)
        backward = torch.ops.aten._flash_attention_backward
        given = (d_out_SHD, q_SHD, k_MKD, v_MKD, out_SHD, lse_HS.contiguous())
        return backward(*given, *lengths, 0.0, causal, none, none, scale=scale)


@functools.cache
def _no_dropout(device: torch.device) -> torch.Tensor:
    """The state of a dropout that there is not."""
    return torch.zeros(2, dtype=torch.uint64, device=device)
