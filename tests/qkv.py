"""Queries, keys and values by chance, and attention over them under any mask.

Shapes: H query heads, K key-value heads, S positions of a row, D head width.
"""

from __future__ import annotations

import torch

H, D = 4, 8


def draw(positions: int, kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, positions, D) for heads in (H, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense(q, k, v, mask, scale=D**-0.5) -> torch.Tensor:
    k, v = (tensor.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for tensor in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v
