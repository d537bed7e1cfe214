"""The servers of ``rollout.remote`` together: the next request goes to the one with the least to do; one that is lost
is left out, and taken back with the policy's weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.sampling.server import Server

_WATCH_SECONDS = 1.0  # between looks at a server's health
_FAILURES = 2  # so many in a row, and it is lost
_WAITS = "it waits for the weights"

Answer = TypeVar("Answer")


@dataclass
class _Member:
    """A server and what it has to do. problem: why it is left out, otherwise None; last: why it last was."""

    server: Server
    tokens: int = 0
    problem: str | None = None
    last: str | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self, problem: str) -> None:
        self.problem = self.last = problem
        self.lost.set()
        warnings.warn(f"rollout.remote: {self.server.url} is left out: {problem}", stacklevel=2)

    def join(self) -> None:
        self.problem = None
        self.lost = asyncio.Event()


class Pool:
    """Servers with the same weights, for use within one event loop.

    Args:
        servers: at least one.
        directory, version: of the weights that they are to have, as ``Server.bring`` takes them.
    """

    def __init__(self, servers: Sequence[Server], directory: Path | None, version: str | None):
        self._members = [_Member(server) for server in servers]
        self._directory = directory
        self._version = version

    async def bring(self, reload: bool, doubt: bool = False) -> None:
        """Gives all servers that answer the weights: see ``Server.bring``. ValueError: one that answers failed.

        A server that does not answer is left out, unless it is the only one: that is waited for. One that is
        ``waiting`` for a transfer of the weights is left out until it has them.
        """

        async def one(member: _Member) -> None:
            async with member.server.client() as client:
                problem = await member.server.failure(client) if len(self._members) > 1 else None
                if problem is None:
                    await member.server.bring(client, self._directory, self._version, reload=reload, doubt=doubt)
                    if member.server.waiting:
                        member.problem = _WAITS
                else:
                    member.leave(problem)

        await _together([one(member) for member in self._members])
        if all(member.problem not in (None, _WAITS) for member in self._members):
            raise ValueError(f"rollout.remote: none of the servers answers: {self._problems()}")

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While it lasts, each server's health is looked at, and lost ones are taken back."""
        watchers = [asyncio.create_task(self._watch(member)) for member in self._members]
        try:
            yield
        finally:
            await _cancelled(watchers)

    @property
    def urls(self) -> list[str]:
        """Of the servers that are not left out, or only until a transfer gives them the weights."""
        return [member.server.url for member in self._members if member.problem in (None, _WAITS)]

    async def ask(self, what: str, tokens: int, request: Callable[[Server], Awaitable[Answer]]) -> Answer:
        """The answer of the server with the least to do; of another one, or later, when it is lost meanwhile.

        Args:
            what: names the request in errors.
            tokens: what it costs a server.

        Raises:
            ValueError: ``request`` did, or no server was there for ``rollout.remote.timeout_seconds``.
        """
        started = time.monotonic()
        while True:
            member = await self._free(what, started)
            member.tokens += tokens
            try:
                answered = asyncio.ensure_future(request(member.server))
                lost = asyncio.ensure_future(member.lost.wait())
                try:
                    await asyncio.wait((answered, lost), return_when=asyncio.FIRST_COMPLETED)
                    if answered.done():
                        return answered.result()
                finally:
                    await _cancelled([answered, lost])
            finally:
                member.tokens -= tokens

    async def _free(self, what: str, started: float) -> _Member:
        limit = self._members[0].server.timeout_seconds
        while True:
            heartbeat()
            if time.monotonic() - started > limit:
                raise ValueError(
                    f"rollout.remote: {what}: no answer within rollout.remote.timeout_seconds={limit:g}: "
                    f"{self._problems()}"
                )
            if there := [member for member in self._members if member.problem is None]:
                return min(there, key=lambda member: member.tokens)
            await asyncio.sleep(min(_WATCH_SECONDS, limit) / 10)

    async def _watch(self, member: _Member) -> None:
        server, failures = member.server, 0
        async with server.client() as client:  # its own: the others' connections may all be in use
            while True:
                await asyncio.sleep(_WATCH_SECONDS)
                problem = await server.failure(client)
                if member.problem is not None:
                    if problem is None:
                        await self._take_back(client, member)
                    continue
                if problem is None and self._directory is not None:
                    version = await server.version(client)
                    if version not in (None, self._version):
                        problem, failures = f"its weights are {version!r}, not {self._version!r}", _FAILURES
                failures = 0 if problem is None else failures + 1
                if problem is not None and failures >= _FAILURES:
                    member.leave(problem)
                    failures = 0

    async def _take_back(self, client: httpx.AsyncClient, member: _Member) -> None:
        try:
            await member.server.bring(client, self._directory, self._version, reload=False, doubt=True)
        except ValueError as error:
            member.problem = str(error)
        else:
            if member.server.waiting:
                member.problem = _WAITS
            else:
                member.join()

    def _problems(self) -> str:
        return "; ".join(f"{member.server.url}: {member.problem or member.last}" for member in self._members)


async def _together(work: Sequence[Awaitable[None]]) -> None:
    """All of it, or the first error; nothing goes on behind its back."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancelled(tasks)


async def _cancelled(tasks: Sequence[asyncio.Future]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
