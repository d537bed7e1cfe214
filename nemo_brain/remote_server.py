"""HTTP to an OpenAI-compatible inference server: requests that are repeated until they succeed, and new weights for it.

Errors are ValueErrors that name the server and what was asked of it; the API key never appears in them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from nemo_brain.config import RemoteConfig

_CONNECT_SECONDS = 10
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 15.0  # seconds between attempts, doubled from one to the other
_BAD_ANSWERS = 4  # so many times in a row a wrong answer is not a hiccup: the request would be answered so for ever
_PASSING = (408, 425, 429)  # HTTP statuses that say "later"; so does every 5xx

Answer = TypeVar("Answer")


class BadAnswer(Exception):
    """What is wrong with an answer of the server."""


class Server:
    """The server of ``rollout.remote``.

    Raises ValueError when the environment variable of the API key is not set.
    """

    def __init__(self, config: RemoteConfig):
        self.config = config
        self.url = config.url.rstrip("/").removesuffix("/v1")
        self._key = ""
        if config.api_key_env is not None:
            self._key = os.environ.get(config.api_key_env, "").strip()
            if not (self._key and self._key.isascii() and self._key.isprintable()):
                raise ValueError(
                    f"rollout.remote.api_key_env: the environment variable {config.api_key_env} is not set, empty, or "
                    "no key (other characters than printable ASCII)"
                )

    def client(self) -> httpx.AsyncClient:
        """A pool of connections, for use within one event loop."""
        return httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=self.config.concurrency),
        )

    async def ask(
        self, client: httpx.AsyncClient, method: str, path: str, what: str, read: Callable[[Any], Answer], body=None
    ) -> Answer:
        """What ``read`` makes of the server's JSON.

        Connection errors, timeouts, 429 and 5xx are repeated with growing, random pauses for ``timeout_seconds``;
        answers that ``read`` refuses with BadAnswer, or that are no JSON, a few times.

        Args:
            what: names the request in errors.

        Raises:
            ValueError: no usable answer within these limits, or a status that says there will be none.
        """
        started = time.monotonic()
        bad = 0
        for attempt in itertools.count(1):
            pause = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)
            left = self.config.timeout_seconds - (time.monotonic() - started)
            limit = min(self.config.request_timeout_seconds, max(left, 0.01))
            try:
                request = client.request(method, self.url + path, json=body, headers=self._headers())
                response = await asyncio.wait_for(request, limit)
                if response.is_success:
                    return read(_json(response))
                problem = f"HTTP {response.status_code}: {_excerpt(response)}"
                if response.status_code < 500 and response.status_code not in _PASSING:
                    raise self._error(what, problem + self._hint(response.status_code))
                bad = 0
                pause = max(pause, _retry_after(response))
            except asyncio.TimeoutError:
                problem = f"no answer within {limit:.3g} seconds"
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
            except BadAnswer as error:
                problem = str(error)
                bad += 1
                if bad == _BAD_ANSWERS:
                    raise self._error(what, f"{bad} wrong answers in a row, the last: {problem}") from None
            left = self.config.timeout_seconds - (time.monotonic() - started)
            if left <= pause:
                raise self._error(
                    what,
                    f"no usable answer within rollout.remote.timeout_seconds={self.config.timeout_seconds:g} "
                    f"({attempt} attempts), the last: {problem}",
                )
            await asyncio.sleep(pause)

    async def wait_until_served(self, client: httpx.AsyncClient) -> None:
        """Returns once the server answers and serves ``rollout.remote.model``; ValueError if it serves others only."""

        def read(answer: Any) -> list[str]:
            try:
                return [model["id"] for model in answer["data"]]
            except (KeyError, TypeError):
                raise BadAnswer(f"no list of models: {str(answer)[:200]}") from None

        names = await self.ask(client, "GET", "/v1/models", "its models (GET /v1/models)", read)
        if self.config.model not in names:
            raise self._error(
                "its models", f"rollout.remote.model={self.config.model} is not served; served: {', '.join(names)}"
            )

    async def reload(self, client: httpx.AsyncClient, directory: Path) -> None:
        """Carries out the steps of ``rollout.remote.reload`` in order. A step that fails is not repeated.

        Raises:
            ValueError: a step failed, with its output.
        """
        for number, step in enumerate(self.config.reload or ()):
            step = _filled_in(step, str(directory))
            name = f"rollout.remote.reload[{number}]"
            if "command" in step:
                await self._run(name, step["command"])
            else:
                await self._call(client, name, step)

    async def _call(self, client: httpx.AsyncClient, name: str, step: dict) -> None:
        url = step["url"] if "url" in step else self.url + "/" + step["path"].lstrip("/")
        method = step.get("method", "POST")
        # The key is the inference server's: another host is not told.
        ours = httpx.URL(url).netloc == httpx.URL(self.url).netloc
        request = client.request(method, url, json=step.get("json"), headers=self._headers() if ours else {})
        try:
            response = await asyncio.wait_for(request, self.config.timeout_seconds)
        except asyncio.TimeoutError:
            problem = f"no answer within rollout.remote.timeout_seconds={self.config.timeout_seconds:g}"
            raise self._error(name, f"{method} {url}: {problem}") from None
        except httpx.RequestError as error:
            raise self._error(name, f"{method} {url}: {type(error).__name__}: {error}") from None
        refused = False
        if response.headers.get("content-type", "").startswith("application/json") and response.content:
            answer = response.json()
            refused = isinstance(answer, dict) and answer.get("success") is False  # SGLang's way to say it
        if refused or not response.is_success:
            raise self._error(name, f"{method} {url}: HTTP {response.status_code}: {_excerpt(response)}")

    async def _run(self, name: str, command: list[str]) -> None:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=asyncio.subprocess.STDOUT
            )
        except OSError as error:
            raise self._error(name, f"{command}: {error}") from None
        try:
            output, _ = await asyncio.wait_for(process.communicate(), self.config.timeout_seconds)
        except asyncio.TimeoutError:
            problem = f"not done within rollout.remote.timeout_seconds={self.config.timeout_seconds:g}"
            raise self._error(name, f"{command}: {problem}") from None
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            last = output.decode(errors="replace").strip()[-500:]
            raise self._error(name, f"{command}: exit status {process.returncode}: {last}")

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _hint(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        return " (the key comes from the environment variable that rollout.remote.api_key_env names)"

    def _error(self, what: str, problem: str) -> ValueError:
        message = f"rollout.remote: {self.url}: {what}: {problem}"
        return ValueError(message.replace(self._key, "***") if self._key else message)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:  # no JSON, or no UTF-8
        raise BadAnswer(f"no JSON: {_excerpt(response)}") from None


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.content[:2000].decode(errors="replace").split())[:300]


def _retry_after(response: httpx.Response) -> float:
    """Seconds; 0 where the header is absent or holds a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0


def _filled_in(value: Any, path: str) -> Any:
    """``{path}`` in every string replaced; other braces stay as they are."""
    if isinstance(value, str):
        return value.replace("{path}", path)
    if isinstance(value, dict):
        return {name: _filled_in(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, path) for item in value]
    return value
