"""Requests of iterations to come, under way at the inference servers while the training ranks do something else."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.together import cancelled
from nemo_brain.sampling.pool import Pool
from nemo_brain.sampling.remote import Answer, RemoteSampler, group_of, in_background


@dataclass(frozen=True)
class _Batch:
    """An iteration's prompts, and where its outputs go."""

    iteration: int
    prompts: Sequence[Prompt]
    found: queue.SimpleQueue


class AheadSampler:
    """Samples for several iterations, the one that was begun first before the others, until it is closed.

    Requests are sent and answers gathered in a thread of its own. New weights may come to a server while it draws an
    output, whose log-prob then is the sum of what each token had when it was drawn. Nobody can compute that again, so
    an output counts once its server has named its weights afterwards (``Pool.ask``): those of a server that was started
    again meanwhile are drawn again.

    Args:
        sampler: of every iteration.
        seed: of the draws.
    """

    def __init__(self, sampler: RemoteSampler, seed: int):
        self.sampler = sampler
        self._seed = seed
        self._open: set[queue.SimpleQueue] = set()
        self._failure: BaseException | None = None
        self._begun: asyncio.Queue[_Batch] = asyncio.Queue()
        self._running = contextlib.ExitStack()
        self._loop = self._running.enter_context(in_background(self._work, queue.SimpleQueue()))

    def begin(self, iteration: int, prompts: Sequence[Prompt]) -> Iterator[tuple[int, SampledGroup]]:
        """Groups for the prompts as they are finished: pairs of a prompt's index and its group.

        The requests go out at once, behind those of the iterations that were begun before. The iterator may be read in
        any thread. Draws and log-probs are those of ``RemoteSampler.sample``.

        Raises:
            ValueError: by the iterator; as ``RemoteSampler.sample``.
        """
        found: queue.SimpleQueue = queue.SimpleQueue()
        self._open.add(found)
        if self._failure is not None:
            found.put(self._failure)
        else:
            with contextlib.suppress(RuntimeError):  # it has just failed, and says so
                self._loop.call_soon_threadsafe(self._begun.put_nowait, _Batch(iteration, prompts, found))
        return self._groups(prompts, found)

    def close(self) -> None:
        """Ends all requests; an iterator that is still being read raises."""
        self._running.close()

    def _groups(self, prompts: Sequence[Prompt], found: queue.SimpleQueue) -> Iterator[tuple[int, SampledGroup]]:
        n = self.sampler.options.outputs
        answers: list[dict[int, Answer]] = [{} for _ in prompts]
        left = len(prompts) * n
        while left:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            p, outputs = item
            left -= len(outputs)
            answers[p] |= outputs
            if len(answers[p]) == n:
                yield p, group_of(prompts[p], [answers[p].pop(index) for index in range(n)])
        self._open.discard(found)

    async def _work(self) -> None:
        draws: set[asyncio.Task] = set()
        try:
            async with self.sampler.connected() as (pool, client):
                try:
                    while True:
                        batch = await self._begun.get()
                        for p in range(len(batch.prompts)):
                            for numbers in self.sampler.requests(range(self.sampler.options.outputs)):
                                draw = asyncio.create_task(self._draw(pool, client, batch, p, numbers))
                                draws.add(draw)
                                draw.add_done_callback(draws.discard)
                finally:
                    await cancelled(draws)
        except BaseException as error:  # being closed, too: nobody waits for what does not come
            self._failure = error
            for found in list(self._open):
                found.put(error)
            raise

    async def _draw(self, pool: Pool, client: httpx.AsyncClient, batch: _Batch, p: int, numbers: range) -> None:
        prompt, iteration = batch.prompts[p], batch.iteration
        try:
            outputs = await self.sampler.outputs(pool, client, prompt, numbers, self._seed, iteration)
        except BaseException as error:  # whoever reads the iteration raises it
            batch.found.put(error)
            if not isinstance(error, Exception):
                raise
        else:
            batch.found.put((p, outputs))
