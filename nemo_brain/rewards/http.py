"""A reward that a server computes: ``POST URL/score``, as examples/serve_reward.py and docs/rewards.md have it."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from typing import Any

import httpx

from nemo_brain.core.http import BadAnswer, HTTPClient, ServerError, excerpt
from nemo_brain.core.together import together
from nemo_brain.rewards.protocol import OutputError

_LARGEST = sys.float_info.max


class HTTPReward:
    """Asks a server, several requests at a time, and repeats what fails in passing.

    Args:
        url: the server's address, like ``http://HOST:PORT``; ``/score`` is added.
        batch_size: outputs per request.
        concurrency: requests at a time.
        api_key_env: the environment variable with the API key, which is sent as a bearer token; None: no key.
        request_timeout_seconds: for one attempt at a request.
        timeout_seconds: for all attempts at it; then the reward fails. While it waits, the other ranks of the replica
            wait in a collective: keep it below ``trainer.hang_timeout_minutes``.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 16,
        concurrency: int = 4,
        api_key_env: str | None = None,
        request_timeout_seconds: float = 120.0,
        timeout_seconds: float = 600.0,
    ):
        if not isinstance(url, str) or not re.fullmatch(r"https?://[^/\s?#@]+[^\s?#@]*", url):
            # The address is shown in errors, so a password has no place in it.
            raise ValueError(
                "reward.url must be an address like http://HOST:PORT, without user name, password or query (a key goes "
                "into the environment variable that reward.api_key_env names)"
            )
        for name, count in {"batch_size": batch_size, "concurrency": concurrency}.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"reward.{name} must be an integer of at least 1, not {count!r}")
        seconds = {"request_timeout_seconds": request_timeout_seconds, "timeout_seconds": timeout_seconds}
        for name, value in seconds.items():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"reward.{name} must be above 0, not {value!r}")
        self._http = HTTPClient("reward", url, api_key_env=api_key_env, concurrency=concurrency, **seconds)
        self._batch_size = batch_size
        self._concurrency = concurrency
        self.name = f"HTTPReward of {self._http.url}"

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> list[float]:
        """Raises OutputError for what is the matter with one output; ConnectionError for everything else."""
        fields = zip(prompts, outputs, references, metadata, strict=True)
        names = ("prompt", "output", "reference", "metadata")
        return asyncio.run(self._score([dict(zip(names, values, strict=True)) for values in fields]))

    async def _score(self, items: list[dict]) -> list[float]:
        slots = asyncio.Semaphore(self._concurrency)  # the budget of a request starts when it is sent
        async with self._http.client() as client:
            starts = range(0, len(items), self._batch_size)
            parts = await together(self._request(client, slots, items, start) for start in starts)
        return [reward for part in parts for reward in part]

    async def _request(
        self, client: httpx.AsyncClient, slots: asyncio.Semaphore, items: list[dict], start: int
    ) -> list[float]:
        part = items[start : start + self._batch_size]
        what = f"POST /score, outputs {start} to {start + len(part) - 1}"
        async with slots:
            try:
                return await self._http.ask(
                    client, "POST", "/score", what, lambda answer: _read(answer, len(part)), {"items": part}, _refused
                )
            except ServerError as error:
                if error.item is None or not 0 <= error.item < len(part):
                    raise ConnectionError(str(error)) from None
                raise OutputError(str(error), start + error.item) from None


def _read(answer: Any, count: int) -> list[float]:
    """The rewards in an answer; BadAnswer where there is not one finite number for each of ``count`` items."""
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise BadAnswer(f'no {{"rewards": [...]}} in {str(answer)[:200]}')
    if len(rewards) != count:
        place = min(len(rewards), count - 1)
        raise BadAnswer(f"{len(rewards)} rewards for {count} outputs; the first without a partner is shown", place)
    for index, value in enumerate(rewards):
        # Python's parser also takes NaN and Infinity, and integers that are no float.
        if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:
            raise BadAnswer(f"the reward {str(value)[:50]} (a finite number is expected)", index)
    return [float(value) for value in rewards]


def _refused(response: httpx.Response) -> None:
    """BadAnswer where the server says which item it failed on: that is not a failure that passes."""
    try:
        error = response.json()["error"]
        item, message = error["item"], error["message"]
    except (ValueError, TypeError, KeyError):
        return
    if type(item) is int:
        raise BadAnswer(
            f"HTTP {response.status_code}: {message if isinstance(message, str) else excerpt(response)}", item
        )
