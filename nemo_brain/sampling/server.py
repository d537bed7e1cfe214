"""The OpenAI-compatible inference server of ``rollout.remote``: what it serves, and new weights for it.

Errors are ValueErrors that name the server and what was asked of it; the API key never appears in them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from nemo_brain.config.brain import RemoteConfig
from nemo_brain.core.http import BadAnswer, HTTPClient, excerpt


class Server(HTTPClient):
    """The server of ``rollout.remote``.

    Raises ValueError when the environment variable of the API key is not set.
    """

    def __init__(self, config: RemoteConfig):
        super().__init__(
            "rollout.remote",
            config.url.rstrip("/").removesuffix("/v1"),
            api_key_env=config.api_key_env,
            concurrency=config.concurrency,
            request_timeout_seconds=config.request_timeout_seconds,
            timeout_seconds=config.timeout_seconds,
        )
        self.config = config

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
            raise self._error(name, f"{method} {url}: HTTP {response.status_code}: {excerpt(response)}")

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


def _filled_in(value: Any, path: str) -> Any:
    """``{path}`` in every string replaced; other braces stay as they are."""
    if isinstance(value, str):
        return value.replace("{path}", path)
    if isinstance(value, dict):
        return {name: _filled_in(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, path) for item in value]
    return value
