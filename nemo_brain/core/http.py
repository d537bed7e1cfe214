"""A client of one HTTP server: JSON requests that are repeated until they succeed or their budget is spent.

Errors name the configuration section, the server and what was asked of it; the API key never appears in them.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import ssl
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.together import within

_CONNECT_SECONDS = 10
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 15.0  # seconds between attempts, doubled from one to the other
_BAD_ANSWERS = 4  # so many times in a row a wrong answer is not a hiccup: the request would be answered so for ever
PASSING = (408, 425, 429)  # HTTP statuses that say "later"; so does every 5xx

Answer = TypeVar("Answer")


class BadAnswer(Exception):
    """What is wrong with an answer of the server. ``item``: which of the request's items it is about, if one."""

    def __init__(self, problem: str, item: int | None = None):
        super().__init__(problem)
        self.item = item


class ServerError(ValueError):
    """A request that got no usable answer. ``item``: that of the last ``BadAnswer``, if these were the reason."""

    item: int | None = None


class HTTPClient:
    """The server that a section of the configuration names.

    Args:
        key: the section, for errors; its keys are named as the other arguments are.
        url: the server's address.
        api_key_env: the environment variable with the API key, which is sent as a bearer token; None: no key.
        concurrency: connections at a time.
        request_timeout_seconds: for one attempt.
        timeout_seconds: for all attempts at a request.

    Raises:
        ValueError: the environment variable is not set, or holds no key.
    """

    def __init__(
        self,
        key: str,
        url: str,
        *,
        api_key_env: str | None,
        concurrency: int,
        request_timeout_seconds: float,
        timeout_seconds: float,
    ):
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._section = key
        self._concurrency = concurrency
        self._request_timeout_seconds = request_timeout_seconds
        self._key = "" if api_key_env is None else environment_key(f"{key}.api_key_env", api_key_env)

    def client(self, connections: int | None = None) -> httpx.AsyncClient:
        """A pool of connections (None: ``concurrency``), for use within one event loop."""
        return httpx.AsyncClient(
            verify=_certificates(),
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=connections or self._concurrency),
        )

    async def ask(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        what: str,
        read: Callable[[Any], Answer],
        body: Any = None,
        refused: Callable[[httpx.Response], None] = lambda response: None,
    ) -> Answer:
        """What ``read`` makes of the server's JSON.

        Connection errors, timeouts, 429 and 5xx are repeated with growing, random pauses for ``timeout_seconds``;
        answers that ``read`` or ``refused`` refuse with BadAnswer, or that are no JSON, a few times.

        Args:
            what: names the request in errors.
            refused: is shown every answer whose status says that there is nothing to read.

        Raises:
            ServerError: no usable answer within these limits, or a status that says there will be none.
        """
        started = time.monotonic()
        bad = 0
        for attempt in itertools.count(1):
            heartbeat()
            pause = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)
            left = self.timeout_seconds - (time.monotonic() - started)
            limit = min(self._request_timeout_seconds, max(left, 0.01))
            try:
                request = client.request(method, self.url + path, json=body, headers=self._headers())
                response = await within(limit, request)
                if response.is_success:
                    return read(_json(response))
                refused(response)
                problem = f"HTTP {response.status_code}: {excerpt(response)}"
                if response.status_code < 500 and response.status_code not in PASSING:
                    raise self.error(what, problem + self._hint(response.status_code))
                bad = 0
                pause = max(pause, _retry_after(response))
            except TimeoutError:
                problem = f"no answer within {limit:.3g} seconds"
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
            except BadAnswer as error:
                problem = str(error)
                bad += 1
                if bad == _BAD_ANSWERS:
                    failure = self.error(what, f"{bad} wrong answers in a row, the last: {problem}")
                    failure.item = error.item
                    raise failure from None
            left = self.timeout_seconds - (time.monotonic() - started)
            if left <= pause:
                raise self.error(
                    what,
                    f"no usable answer within {self._section}.timeout_seconds={self.timeout_seconds:g} "
                    f"({attempt} attempts), the last: {problem}",
                )
            await asyncio.sleep(pause)
        raise AssertionError("attempts do not end by themselves")

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _hint(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        return f" (the key comes from the environment variable that {self._section}.api_key_env names)"

    def error(self, what: str, problem: str) -> ServerError:
        """The error that ``what`` was asked of this server, and met with this problem."""
        message = f"{self._section}: {self.url}: {what}: {problem}"
        return ServerError(message.replace(self._key, "***") if self._key else message)


def environment_key(key: str, name: str) -> str:
    """The API key in the environment variable ``name``, which the configuration key ``key`` names.

    Raises:
        ValueError: it is not set, or holds no key.
    """
    value = os.environ.get(name, "").strip()
    if not (value and value.isascii() and value.isprintable()):
        raise ValueError(
            f"{key}: the environment variable {name} is not set, empty, or no key (other characters than printable "
            "ASCII)"
        )
    return value


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Made once, for reading them takes longer than a request; not kept in a client, which NeMo's trainer copies."""
    return httpx.create_ssl_context()


def excerpt(response: httpx.Response) -> str:
    """The beginning of an answer, in one line."""
    return " ".join(response.content[:2000].decode(errors="replace").split())[:300]


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:  # no JSON, or no UTF-8
        raise BadAnswer(f"no JSON: {excerpt(response)}") from None


def _retry_after(response: httpx.Response) -> float:
    """Seconds; 0 where the header is absent or holds a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0
