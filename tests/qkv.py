"""Queries, keys and values by chance.

Shapes: H query heads, K key-value heads, S positions of a row, D head width.
"""

from __future__ import annotations

import torch

H, D = 4, 8


def draw(positions: int, kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, positions, D) for heads in (H, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
