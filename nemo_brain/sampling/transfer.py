"""The policy's weights on their way to the workers of inference servers, bucket by bucket, over process groups.

Each server has a group of its own, of this process and the server's workers: one that is lost takes no other along. A
group lasts for one transfer.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
import warnings
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any

import httpx
import torch
import torch.distributed as dist

from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.ranks import in_thread
from nemo_brain.sampling.server import Server
from nemo_brain.sampling.vllm_worker.nemo_brain_vllm import address_towards, process_group

BUCKET_BYTES = 256 * 2**20  # tensors that are in memory at a time, on both sides; a larger one is so by itself
_JOIN_SECONDS = 120.0  # a server's workers come between two steps of decoding
_POLL_SECONDS = 0.0005
_LOOKS, _LOOK_SECONDS = 6, 0.5  # at the health of a server for which something has failed


class Transfer:
    """Sends tensors to all workers of some servers. Used by one process; nothing of it hangs.

    A server that is lost meanwhile, as its ``/health`` says, is left out with a warning; ``Pool`` takes it back.

    Args:
        servers: those that are ``waiting`` for the weights.
        version: the name of the weights.

    Raises:
        ValueError: a server's workers do not join; says what to do about it. Nothing was changed on them.
    """

    def __init__(self, servers: Sequence[Server], version: str):
        self.bytes = 0  # sent to each server
        self.seconds = 0.0
        self._version = version
        self._started = time.perf_counter()
        self._error: Exception | None = None
        self._bucket: list[tuple[str, torch.Tensor]] = []
        self._bucket_bytes = 0
        self._number = 0
        self._receivers: list[_Receiver] = []
        # In the order of the configuration, one after the other: two replicas that give the same servers weights would
        # otherwise wait for each other.
        for server in servers:
            self._receivers += self._attempt(server, functools.partial(_joined, server)) or []
        if self._error is not None:
            raise self._error

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor; it is sent with others. What goes wrong, ``finish`` says."""
        self._bucket.append((name, tensor.contiguous()))
        self._bucket_bytes += tensor.nbytes
        if self._bucket_bytes >= BUCKET_BYTES:
            self._send()

    def finish(self) -> list[str]:
        """Sends what is left, and has the servers forget what they have computed with older weights.

        Returns:
            The addresses of the servers that have the weights now.

        Raises:
            ValueError: one does not have them, though it is there.
        """
        if self._bucket:
            self._send()
        self._send()  # the empty one, which is the last
        for receiver in list(self._receivers):
            self._attempt(receiver.server, functools.partial(receiver.finish, self._version))
        self.seconds = time.perf_counter() - self._started
        if self._error is not None:
            raise self._error
        return [receiver.server.url for receiver in self._receivers]

    def _send(self) -> None:
        bucket, self._bucket = self._bucket, []
        self.bytes += self._bucket_bytes
        self._bucket_bytes = 0
        for receiver in list(self._receivers):
            self._attempt(receiver.server, functools.partial(receiver.begin, self._number, bucket))
        for receiver in list(self._receivers):
            self._attempt(receiver.server, receiver.wait)
        self._number += 1

    def _attempt(self, server: Server, work: Callable[[], Any]) -> Any:
        """The result of ``work``; a server for which it fails is given nothing more."""
        try:
            return work()
        except (RuntimeError, ValueError) as error:  # torch's are RuntimeErrors
            self._receivers = [receiver for receiver in self._receivers if receiver.server is not server]
            problem = asyncio.run(_failure(server))
            if problem is None:
                self._error = error if isinstance(error, ValueError) else server.error("its weights", str(error))
            else:
                server.waiting = None  # until it is back
                warnings.warn(
                    f"rollout.remote: {server.url} was lost when it was given weights: {problem}", stacklevel=2
                )
        return None


class _Receiver:
    """One server, whose workers have joined."""

    def __init__(self, server: Server):
        self.server = server
        workers = asyncio.run(_with_client(server, server.workers))
        devices = {"cuda" if torch.cuda.is_available() else "cpu", *(worker["device"] for worker in workers)}
        self._device = "cuda" if devices == {"cuda"} else "cpu"
        url = httpx.URL(server.url)
        address = address_towards(url.host, url.port or 80)
        seconds = min(_JOIN_SECONDS, server.timeout_seconds)
        # It listens on every address of this machine, at a port that is free.
        self._store = dist.TCPStore(
            address, 0, is_master=True, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
        place = {"host": address, "port": self._store.port, "workers": len(workers), "device": self._device}
        arguments = {**place, "seconds": seconds}
        self._answer = in_thread(
            lambda: asyncio.run(_with_client(server, lambda client: server.receive(client, arguments))), "receive"
        )
        joined = in_thread(
            lambda: process_group(self._store, 0, 1 + len(workers), self._device, address, seconds), "join"
        )
        self._works: list[Any] = []
        self._patience = seconds
        hint = (
            f"the server's workers have to reach {address}, port {self._store.port} and others, and this machine them; "
            "or set rollout.remote.transfer=directory"
        )
        try:
            self._until(joined.done)
            self._group = joined.result()
        except (RuntimeError, ValueError) as error:
            raise server.error(
                "its weights", f"not all of its {len(workers)} workers have joined the process group: {error}; {hint}"
            ) from None

    def begin(self, number: int, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        described = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in bucket]
        self._store.set(str(number), json.dumps(described))
        self._works = [self._group.broadcast(tensor.to(self._device), 0) for _, tensor in bucket]

    def wait(self) -> None:
        """Until the bucket is sent. RuntimeError: it cannot be."""
        self._until(lambda: all(work.is_completed() for work in self._works))
        for work in self._works:
            work.wait()
        self._works = []

    def finish(self, version: str) -> None:
        self._until(self._answer.done)
        self._answer.result()
        asyncio.run(_with_client(self.server, lambda client: self.server.received(client, version)))

    def _until(self, done: Callable[[], bool]) -> None:
        """Returns when it is so. RuntimeError, ValueError: the server has given up, or it takes too long."""
        ended = time.monotonic() + self._patience
        while not done():
            heartbeat()
            if self._answer.done():
                self._answer.result()
                if not done():
                    raise RuntimeError("the server ended the transfer")
            if time.monotonic() > ended:
                raise RuntimeError(f"nothing within {self._patience:g} seconds")
            time.sleep(_POLL_SECONDS)


def _joined(server: Server) -> list[_Receiver]:
    return [_Receiver(server)]


async def _with_client(server: Server, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async with server.client() as client:
        return await work(client)


async def _failure(server: Server) -> str | None:
    """Why the server is gone; None: it is not. It may take a moment until ``/health`` says so."""
    async with server.client() as client:
        for _ in range(_LOOKS):
            if problem := await server.failure(client):
                return problem
            await asyncio.sleep(_LOOK_SECONDS)
    return None
