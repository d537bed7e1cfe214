"""Tasks that a single cancellation does not end, as a request of httpx that is just connecting."""

from __future__ import annotations

import asyncio
import queue
import threading
import time

import pytest

from nemo_brain.core import together as module
from nemo_brain.core.together import cancelled, together, within
from nemo_brain.sampling.remote import in_background


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr("nemo_brain.sampling.remote.AGAIN_SECONDS", 0.05)


class Deaf:
    """Goes on after ``losses`` cancellations."""

    def __init__(self, losses: int = 1):
        self.losses, self.ended = losses, False

    async def __call__(self) -> None:
        try:
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.losses -= 1
                    if self.losses < 0:
                        raise
        finally:
            self.ended = True


def test_what_loses_a_cancellation_is_cancelled_again():
    deaf = Deaf(losses=2)

    async def main() -> None:
        task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        await cancelled([task])

    asyncio.run(asyncio.wait_for(main(), 10))
    assert deaf.ended


def test_being_cancelled_meanwhile_ends_it_only_once_all_have_ended():
    deaf = Deaf(losses=4)

    async def main() -> None:
        task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        ending = asyncio.ensure_future(cancelled([task]))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert deaf.ended

    asyncio.run(asyncio.wait_for(main(), 10))


def test_the_first_error_ends_the_others():
    deaf = Deaf()

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("first")

    async def main() -> None:
        with pytest.raises(KeyError, match="first"):
            await together([deaf(), fails()])
        assert deaf.ended

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_result_within_the_time_and_none():
    deaf = Deaf()

    async def main() -> None:
        assert await within(10, asyncio.sleep(0.01, "result")) == "result"
        with pytest.raises(KeyError):
            await within(10, together([fails()]))
        with pytest.raises(TimeoutError):
            await within(0.01, deaf())
        assert deaf.ended

    async def fails() -> None:
        raise KeyError

    asyncio.run(asyncio.wait_for(main(), 10))


def test_work_in_the_background_that_nobody_has_ended_says_so():
    async def ends() -> None:
        raise asyncio.CancelledError

    outcome: queue.SimpleQueue = queue.SimpleQueue()
    with in_background(ends, outcome):
        assert isinstance(outcome.get(timeout=10), RuntimeError)


def test_work_in_the_background_is_ended_with_its_thread():
    deaf = Deaf()
    began = time.monotonic()
    with in_background(deaf, queue.SimpleQueue()):
        time.sleep(0.05)
    assert deaf.ended and time.monotonic() - began < 10
    assert "rollout.remote" not in [thread.name for thread in threading.enumerate()]
