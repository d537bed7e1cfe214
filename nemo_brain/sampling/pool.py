"""The servers of ``rollout.remote`` together: the next request goes to the one with the least to do; one that is lost
is left out, and taken back with the policy's weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.together import cancelled, together
from nemo_brain.sampling.server import Server

_WATCH_SECONDS = 1.0  # between looks at a server's health
_FAILURES = 2  # so many in a row, and it is lost
_ATTEMPTS = 10  # answers to a request of which none counts
_SILENT = "it does not say which weights it has"
_WAITS = "it waits for the weights"

Answer = TypeVar("Answer")


@dataclass
class ServedWeights:
    """The weights that the servers are to have, for all who ask them; changed by the training ranks alone.

    directory: where they are; None: nowhere, or those that the servers were started with. version: their name; None:
    those that the servers were started with. step: the optimizer
    steps behind them, or behind the older ones while they are being replaced. replaced: the name of these. named: only
    servers that keep names are used.
    """

    directory: Path | None = None
    version: str | None = None
    step: int = 0
    replaced: str | None = None
    named: bool = False

    def replace(self, version: str) -> None:
        """Servers have either, until ``settle``; those that are lost meanwhile are not taken back."""
        self.version, self.replaced = version, self.version or ""

    def settle(self, step: int) -> None:
        """All servers have the new ones."""
        self.step, self.replaced = step, None

    @property
    def changing(self) -> bool:
        return self.replaced is not None

    def admits(self, version: str) -> bool:
        """Whether a server may have weights of this name."""
        return self.version is None or version in (self.version, self.replaced)


@dataclass
class _Member:
    """A server and what it has to do. problem: why it is left out, otherwise None; last: why it last was; life: what it
    last named with a right version, None if it never has; tried, looked, named: when it was last asked for that, and
    answered, and named a right one; looking: while it is asked."""

    server: Server
    tokens: int = 0
    problem: str | None = None
    last: str | None = None
    life: str | None = None
    tried: float = -math.inf
    looked: float = -math.inf
    named: float = -math.inf
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def leave(self, problem: str) -> None:
        self.problem = self.last = problem
        self.lost.set()
        warnings.warn(f"rollout.remote: {self.server.url} is left out: {problem}", stacklevel=2)

    def join(self) -> None:
        self.problem = None
        self.lost = asyncio.Event()


@dataclass(frozen=True)
class _Asked:
    """A server as it stood when it was asked for something."""

    member: _Member
    life: str | None
    lost: asyncio.Event


class Pool:
    """Servers with the same weights, for use within one event loop.

    Args:
        servers: at least one.
        weights: that they are to have.
        requests: so many at a time to each.
    """

    def __init__(self, servers: Sequence[Server], weights: ServedWeights, requests: int):
        self._members = [_Member(server) for server in servers]
        self._weights = weights
        self._places = asyncio.Semaphore(requests * len(self._members))

    async def bring(self, reload: bool) -> None:
        """Gives all servers that answer the weights: see ``Server.bring``. ValueError: one that answers failed.

        A server that does not answer is left out, unless it is the only one: that is waited for. One that is
        ``waiting`` for a transfer of the weights is left out until it has them.
        """

        async def one(member: _Member) -> None:
            async with member.server.client() as client:
                problem = await member.server.failure(client) if len(self._members) > 1 else None
                if problem is None:
                    await self._give(client, member, reload=reload, doubt=False)
                    if member.server.waiting:
                        member.problem = _WAITS
                else:
                    member.leave(problem)

        await together(one(member) for member in self._members)
        if all(member.problem not in (None, _WAITS) for member in self._members):
            raise ValueError(f"rollout.remote: none of the servers answers: {self._problems()}")

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While it lasts, each server's health is looked at, and lost ones are taken back."""
        # Connections of their own: the others' may all be in use.
        async with self._members[0].server.client(2 * len(self._members)) as self._client:
            problems = await together(self._look(member) for member in self._members)
            for member, problem in zip(self._members, problems, strict=True):
                if problem is not None and member.problem is None:
                    member.leave(problem)
            watchers = [asyncio.create_task(self._watch(member)) for member in self._members]
            try:
                yield
            finally:
                await cancelled(watchers)

    @property
    def urls(self) -> list[str]:
        """Of the servers that are not left out, or only until a transfer gives them the weights."""
        return [member.server.url for member in self._members if member.problem in (None, _WAITS)]

    async def ask(self, what: str, tokens: int, request: Callable[[Server], Awaitable[Answer]]) -> Answer:
        """The answer of the server with the least to do; of another one, or later, when it is lost meanwhile.

        If the server keeps the name of its weights, an answer counts once it has named them afterwards: those that it
        should have, and it has had no others since it was asked.

        Args:
            what: names the request in errors.
            tokens: what it costs a server.

        Raises:
            ValueError: ``request`` did, or no server was there for ``rollout.remote.timeout_seconds``.
        """
        for _ in range(_ATTEMPTS):
            async with self._places:
                answer, asked = await self._answer(what, tokens, request)
            if await self._had_the_weights(asked):
                return answer
        raise ValueError(
            f"rollout.remote: {what}: {_ATTEMPTS} times its server was lost, or had other weights, before it had named "
            f"them after its answer: {self._problems()}"
        )

    async def _had_the_weights(self, asked: _Asked) -> bool:
        """Whether a server has had ours, whichever they were, from when it was asked to now."""
        member, now = asked.member, time.monotonic()
        while not asked.lost.is_set():
            heartbeat()
            if member.named > now:
                return asked.life == member.life
            if member.looked > now and asked.life is None and member.life is None:
                return True  # it keeps no name: nobody can tell
            if time.monotonic() - now > member.server.timeout_seconds:
                member.leave(_SILENT)
            elif member.tried <= now and (member.life is None or not self._busy):  # otherwise the watcher will look
                async with member.looking:
                    if member.tried <= now and not asked.lost.is_set():
                        problem = await self._look(member)
                        if problem is not None and not asked.lost.is_set():
                            member.leave(problem)
            else:
                await asyncio.sleep(_WATCH_SECONDS / 10)
        return False

    @property
    def _busy(self) -> bool:
        return any(member.tokens for member in self._members)

    async def _answer(
        self, what: str, tokens: int, request: Callable[[Server], Awaitable[Answer]]
    ) -> tuple[Answer, _Asked]:
        """With how the server stood that gave it when it was asked."""
        started = time.monotonic()
        while True:
            member = await self._free(what, started)
            member.tokens += tokens
            try:
                asked = _Asked(member, member.life, member.lost)
                answered = asyncio.ensure_future(request(member.server))
                waiting = asyncio.ensure_future(asked.lost.wait())
                try:
                    await asyncio.wait((answered, waiting), return_when=asyncio.FIRST_COMPLETED)
                    if answered.done():
                        return answered.result(), asked
                finally:
                    await cancelled([answered, waiting])
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
        failures = 0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            problem = await member.server.failure(self._client)
            if member.problem is not None:
                # What a directory holds may be half of it meanwhile.
                if problem is None and not (self._weights.changing and self._weights.directory):
                    await self._take_back(member)
                continue
            if problem is None and (problem := await self._look(member)) is not None:
                failures = _FAILURES
            failures = 0 if problem is None else failures + 1
            if problem is not None and failures >= _FAILURES:
                member.leave(problem)
                failures = 0

    async def _take_back(self, member: _Member) -> None:
        member.life = None
        try:
            await self._give(self._client, member, reload=False, doubt=True)
        except ValueError as error:
            member.problem = str(error)
            return
        if member.server.waiting:
            member.problem = _WAITS
            return
        # Before it is asked for anything: what it is asked for counts under the name that it has by then.
        now = time.monotonic()
        problem = await self._look(member)
        if problem is None and member.looked < now:
            problem = _SILENT
        if problem is None:
            member.join()
        else:
            member.problem = problem

    async def _look(self, member: _Member) -> str | None:
        """What is wrong with the weights that a server says it has."""
        asked = member.tried = time.monotonic()
        try:
            found = await member.server.named_now(self._client)
        except httpx.HTTPError:
            return None  # whether it is lost, its health says
        if found is None and (self._weights.named or member.life is not None):
            return _SILENT
        member.looked = asked
        if found is None:
            return None
        if not self._weights.admits(found.version):
            return f"its weights are {found.version!r}, not {self._weights.version!r}"
        member.life, member.named = found.life, asked
        return None

    async def _give(self, client: httpx.AsyncClient, member: _Member, *, reload: bool, doubt: bool) -> None:
        weights = self._weights
        names = weights.version, weights.replaced
        await member.server.bring(client, weights.directory, *names, reload=reload, doubt=doubt)
        if weights.named and await member.server.named(client) is None:
            raise ValueError(
                f"rollout.ahead: {member.server.url} does not say which weights it has (as vLLM with "
                "VLLM_SERVER_DEV_MODE=1 and SGLang do), so that outputs of a server that was started again meanwhile "
                "could not be told: use one that does, or set rollout.ahead=0"
            )

    def _problems(self) -> str:
        return "; ".join(f"{member.server.url}: {member.problem or member.last}" for member in self._members)
