"""When a run is asked to end early: signals, and a limit of wall-clock time.

They are remembered, never acted upon where they arrive: the ranks agree at points where all of them are, save, and
leave with ``signals.EXIT_CODE``.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from nemo_brain.core import signals


class Interrupted(Exception):
    """The run ends early, all its ranks at the same point; ``str`` says why."""


class Interruption:
    """Whether the run shall end early.

    Args:
        limit_minutes: of wall-clock time from now on; None: no limit.
    """

    def __init__(self, limit_minutes: float | None = None):
        self._reason: str | None = None
        self._deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self._limit_minutes = limit_minutes
        self._ignored = False

    def listen(self) -> None:
        """Takes the signals from now on. After Lightning has installed its own handlers; in the main thread."""
        signals.listen(lambda number: self.request(f"signal {number.name}"))

    def ignore(self) -> None:
        """From now on nothing ends the run early: what is left is short, and cannot be gone on with."""
        self._ignored = True

    def request(self, reason: str) -> None:
        """Asks the run to end, for a reason that is shown; the first one counts."""
        self._reason = self._reason or reason

    @property
    def requested(self) -> str | None:
        """Why this rank was asked to end; None: it was not."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.request(f"trainer.stop_after_minutes={self._limit_minutes:g}")
        return None if self._ignored else self._reason

    @property
    def reason(self) -> str:
        """Why the run ends, once the ranks have agreed that it does."""
        return self._reason or "another rank was asked to end"

    def agreed(self, *also: bool, group: dist.ProcessGroup | None = None) -> list[bool]:
        """Whether any rank was asked to end, and whether each of ``also`` is true on any.

        A collective of the group; None: of all ranks.
        """
        flags = [self.requested is not None, *also]
        if dist.get_world_size(group) == 1:
            return flags
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        counts = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=group)
        return [bool(flag) for flag in counts.tolist()]
