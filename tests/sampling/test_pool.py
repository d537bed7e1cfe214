"""Servers that are lost, one look at a time, without any that answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httpx
import pytest
from remote_samplers import PROMPTS, sampler

from nemo_brain.sampling import server as server_module
from nemo_brain.sampling.ahead import AheadSampler
from nemo_brain.sampling.pool import Pool, ServedWeights
from nemo_brain.sampling.server import Named


class NamesAnother:
    """A server that takes a while to say that its weights are another run's."""

    url, timeout_seconds = "http://server", 20.0

    def __init__(self) -> None:
        self.looks = 0

    async def named_now(self, client) -> Named:
        self.looks += 1
        await asyncio.sleep(0.3)
        return Named("another run's", "life")


def test_answers_that_come_during_a_look_do_not_look_again_once_it_has_failed():
    async def ask_at_once() -> tuple[int, list]:
        server = NamesAnother()
        pool = Pool([server], ServedWeights(version="1"), 8)  # type: ignore[list-item]
        pool._client = None

        async def answered(after: float) -> bool:
            _, asked = await pool._answer("an output", 1, lambda _: asyncio.sleep(after))
            return await pool._had_the_weights(asked)

        with pytest.warns(UserWarning, match="is left out: its weights are \"another run's\", not '1'"):
            counted = await asyncio.gather(*(answered(0.01 * i) for i in range(4)))
        return server.looks, counted

    assert asyncio.run(ask_at_once()) == (1, [False] * 4)


def test_a_server_whose_machine_is_gone_is_not_taken_for_a_busy_one(monkeypatch):
    """Nothing answers a connection to it, where a busy server's system would: a queue that is full, and not emptied."""
    monkeypatch.setattr(server_module, "_PROBE_SECONDS", 0.3)

    async def failure(url: str) -> str | None:
        server = sampler(url)._servers[0]
        async with httpx.AsyncClient() as client:
            return await server.failure(client)

    with contextlib.ExitStack() as sockets:
        listening = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert asyncio.run(failure(url)) is None, "connected, and late with its answer"
        for _ in range(4):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        assert str(asyncio.run(failure(url))).startswith("ConnectTimeout")


def test_a_sampler_ahead_that_has_failed_says_so_to_whoever_reads_or_begins():
    ours = sampler("http://127.0.0.1:9")

    @contextlib.asynccontextmanager
    async def connected():
        await asyncio.sleep(0.1)
        raise ValueError("no certificates")
        yield

    ours.connected = connected  # type: ignore[method-assign]
    ahead = AheadSampler(ours, 1)
    begun = ahead.begin(1, PROMPTS)
    for groups in (begun, ahead.begin(2, PROMPTS)):
        with pytest.raises(ValueError, match="no certificates"):
            list(groups)
    ahead.close()
    with pytest.raises(ValueError, match="no certificates"):
        list(ahead.begin(3, PROMPTS))
