"""Work that ranks do for each other: what one has found, or what has gone wrong on it, becomes every rank's.

An exception on one rank alone would leave the others waiting in their next collective. Here it is raised on all of
them: on the rank it came from as it is, on the others with that rank's traceback as a note.
"""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.interruption import Interrupted, Interruption

Result = TypeVar("Result")

_POLL_SECONDS = 0.5


def is_first_rank() -> bool:
    """Whether this is rank 0 of all, also before the ranks have met."""
    return dist.get_rank() == 0 if dist.is_initialized() else int(os.environ.get("RANK", 0)) == 0


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, in their order, on all of them. A collective of the group; None: of all ranks."""
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def on_all_ranks(
    work: Callable[[], Result], group: dist.ProcessGroup | None = None, interruption: Interruption | None = None
) -> Result:
    """Each rank's own result of ``work``. A collective of the group; None: of all ranks.

    Args:
        interruption: ``work`` waits for something. It runs in a thread, and is left to itself where the run is asked to
            end meanwhile; only with all ranks.

    Raises:
        Exception: what ``work`` raised on the first rank on which it did; on every rank.
        Interrupted: on every rank.
    """
    heartbeat()
    error: Exception | None = None
    result: Result
    try:
        result = work() if interruption is None else _in_background(work, interruption)
    except Interrupted:
        raise  # all ranks have agreed on it
    except Exception as failure:
        error = failure
    for found in gathered(None if error is None else (_said(error), _portable(error)), group):
        if found is not None:
            said, copy = found
            # A rank with an error of its own raises that one's, unless it is the same: its traceback is worth more.
            raise error if error is not None and _said(error) == said else copy
    return result


def raise_on_all_ranks(errors: Sequence[Exception]) -> None:
    """Raises what any rank has come upon meanwhile, while the others waited for it elsewhere: see ``on_all_ranks``."""

    def work() -> None:
        for error in errors:
            raise error

    on_all_ranks(work)


def on_first_rank(
    work: Callable[[], Result], group: dist.ProcessGroup | None = None, interruption: Interruption | None = None
) -> Result:
    """The result of ``work`` on the group's first rank, on all of its ranks.

    Args, Raises: as ``on_all_ranks``. With ``interruption`` every rank of the run calls it, each with its own group.
    """
    first = not dist.is_initialized() or dist.get_rank(group) == 0
    everyone = None if interruption is not None else group
    result: Any = on_all_ranks(lambda: work() if first else None, everyone, interruption)
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        answer = [result]
        dist.broadcast_object_list(answer, _first_of(group), group=group)
        (result,) = answer
    return result


def in_thread(work: Callable[[], Result], name: str) -> Future[Result]:
    """Runs ``work`` in a thread that keeps no process alive which has nothing else to do."""
    future: Future[Result] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has one of its own
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _in_background(work: Callable[[], Result], interruption: Interruption) -> Result:
    """``work`` in a thread, until it is done on all ranks. A collective of all ranks."""
    running = in_thread(work, "background")
    waiting = True
    while waiting:
        running_here = not _done(running, _POLL_SECONDS)
        interrupted, waiting = interruption.agreed(running_here)
        if interrupted:
            raise Interrupted(interruption.reason)
    return running.result()


def _done(future: Future, seconds: float) -> bool:
    try:
        future.exception(seconds)
    except TimeoutError:
        return False
    return True


def _first_of(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_process_group_ranks(group)[0]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _portable(error: Exception) -> Exception:
    """The error as another rank can raise it."""
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # it cannot be pickled, or not be made again
        copy = RuntimeError(_said(error))
    copy.add_note(f"Raised on rank {dist.get_rank() if dist.is_initialized() else 0}:\n{text}")
    return copy
