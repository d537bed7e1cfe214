"""The sign by which ``supervision`` sees that a process gets further. A room of its own, for it imports nothing."""

from __future__ import annotations

_count = 0


def beat() -> None:
    """Says that this process has just got further: a micro-batch, a tick of sampling, an attempt at a request.

    In a run that does not hang there is one in any ``trainer.hang_timeout_minutes`` on some rank.
    """
    global _count
    _count += 1


def beats() -> int:
    return _count
