"""Moments of gradient estimates sum_i c_i g_i from the outputs' Gram matrix K_ij = g_i . g_j and coefficients alone.

Shapes: M a pool of outputs, G groups of it, N outputs per group.
"""

from __future__ import annotations

import torch


def spread(c_GN: torch.Tensor, places_GN: torch.Tensor, pool: int) -> torch.Tensor:
    """The groups' coefficients as rows over the pool [G, M]."""
    return torch.zeros(len(c_GN), pool, dtype=torch.float64).scatter_(1, places_GN, c_GN)


def products(gram_MM: torch.Tensor, c_GM: torch.Tensor) -> tuple[torch.Tensor, float]:
    """|estimate|^2 of each group [G], and their mean's squared norm without bias.

    Different groups of a partition are independent, so their products' mean is |mean|^2.
    """
    products_GG = c_GM @ gram_MM @ c_GM.T
    norms_G, count = products_GG.diagonal(), len(products_GG)
    return norms_G, float((products_GG.sum() - norms_G.sum()) / (count * (count - 1)))
