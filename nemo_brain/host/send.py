"""Tensors of the host on their way to a card that computes meanwhile."""

from __future__ import annotations

import torch


def sent(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor on the device; nothing waits for it, nor for what the card has still to do."""
    return pinned(tensor, device).to(device, dtype, non_blocking=True)


def pinned(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor, in pages that a card can read by itself: of others CUDA may copy only when the stream has got there.
    torch keeps such memory until the copy has been made."""
    card = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if card else tensor
