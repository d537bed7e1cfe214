"""The sign by which ``durability.supervision`` sees that a process gets further."""

from __future__ import annotations

_count = 0


def heartbeat() -> None:
    """Says that this process has just got further: a micro-batch, a tick of sampling, an attempt at a request.

    In a run that does not hang there is one in any ``trainer.hang_timeout_minutes`` on some rank.
    """
    global _count
    _count += 1


def heartbeats() -> int:
    return _count
