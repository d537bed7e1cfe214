"""Serves a reward over HTTP, for ``HTTPReward`` and any other client: docs/rewards.md has the requests and answers."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import signal
from collections.abc import AsyncIterator, Mapping
from typing import Any

import uvicorn
from omegaconf import DictConfig
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nemo_brain.config.serve_reward import check_serve
from nemo_brain.core.http import environment_key
from nemo_brain.rewards.batching import Items, RewardBatcher
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import RewardError

_FIELDS = {"prompt", "output", "reference", "metadata"}
# A request that is refused is read all the same, up to this: a client that is still sending does not see the answer.
_DISCARDED = 2**30
_LOG = logging.getLogger("uvicorn.error")  # which uvicorn shows


def serve(cfg: DictConfig) -> None:
    """Serves until SIGTERM or SIGINT, and then finishes the requests that it has.

    Raises:
        ValueError: the configuration is wrong, the API key is not set, or the reward cannot be made or loaded.
    """
    config = check_serve(cfg)
    key = None if config.api_key_env is None else environment_key("api_key_env", config.api_key_env)
    reward = make_reward(config.reward, alone="the reward server")

    def stop() -> None:
        server.should_exit = True

    batcher = RewardBatcher(reward, config.max_batch, config.batch_wait_seconds, stop)
    app = make_app(batcher, config.max_request_bytes, key)
    options: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "info", "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, host=config.host, port=config.port, **options))
    # uvicorn raises the signal again once it is done; an end that was asked for is a success.
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_, lambda *_: None)
    server.run()
    if batcher.failure is not None:
        raise ValueError(str(batcher.failure)) from batcher.failure


def make_app(batcher: RewardBatcher, max_request_bytes: int, key: str | None) -> Starlette:
    """The ASGI application, which starts and ends the batcher.

    Args:
        max_request_bytes: larger requests are answered 413.
        key: what ``/score`` wants as a bearer token; None: nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        # All requests have been answered by now; only an abandoned call, or loading, may still go on.
        batcher.close(timeout=5)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        if not batcher.ready:
            return _error(503, "the reward is being loaded", headers={"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    async def score(request: Request) -> Response:
        allowed = key is None or _has_key(request, key)
        body = await _body(request, max_request_bytes if allowed else 0)
        if not allowed:
            return _error(401, "send the API key as Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        if not batcher.ready:
            return await ready(request)
        if body is None:
            return _error(413, f"the request has more than max_request_bytes={max_request_bytes}: send fewer items")
        items = parse_items(body)
        future = batcher.submit(items)
        answer = asyncio.wrap_future(future)
        # A client that has given up asks again: what it has left behind is not to hold that up.
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not answer.done():
            answer.cancel()
            return Response(status_code=499)  # nobody reads it
        try:
            return JSONResponse({"rewards": answer.result()})
        except RewardError as error:
            _LOG.warning("%s", error)
            return _error(500, str(error), error.index)

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, ItemError):
            return _error(422, str(error), error.index)
        assert isinstance(error, HTTPException)
        return _error(error.status_code, error.detail, headers=error.headers)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/score", score, methods=["POST"]),
        ],
        exception_handlers={HTTPException: failed, ItemError: failed},
        lifespan=lifespan,
    )


class ItemError(Exception):
    """What is wrong with the items of a request, and with which of them."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index


def parse_items(body: bytes) -> Items:
    """The items of a request; the error of what is no JSON (400) or not of the documented form (422)."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON: {error}") from None
    if not isinstance(fields, dict) or fields.keys() != {"items"} or not isinstance(fields["items"], list):
        raise ItemError('send {"items": [{"prompt": ..., "output": ...}, ...]}')
    items = Items()
    for index, item in enumerate(fields["items"]):
        if not isinstance(item, dict) or not {"prompt", "output"} <= item.keys() <= _FIELDS:
            raise ItemError(f"items[{index}] must have prompt and output, and may have reference and metadata", index)
        reference, metadata = item.get("reference"), item.get("metadata")
        for name in ("prompt", "output", *(["reference"] if reference is not None else [])):
            if not isinstance(item[name], str):
                raise ItemError(f"items[{index}].{name} must be a string", index)
            try:
                item[name].encode()
            except UnicodeEncodeError:
                raise ItemError(f"items[{index}].{name} has half of a surrogate pair", index) from None
        if not isinstance(metadata, (dict, type(None))):
            raise ItemError(f"items[{index}].metadata must be an object", index)
        items += Items([item["prompt"]], [item["output"]], [reference], [metadata or {}])
    return items


def _has_key(request: Request, key: str) -> bool:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), key.encode())


async def _body(request: Request, limit: int) -> bytes | None:
    """The request's content; None, and no more than the limit is kept, where it is larger."""
    body, size = bytearray(), 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                body += part
            elif size > limit + _DISCARDED:
                break
    except ClientDisconnect:
        raise HTTPException(499) from None
    return bytes(body) if size <= limit else None


def _error(
    status: int, message: str, item: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "item": item}}, status, headers)
