"""Outputs sampled by an OpenAI-compatible inference server: vLLM, SGLang or TensorRT-LLM's trtllm-serve.

Nothing here is distributed: one process asks one server. What was read in the servers' sources (main branches of 2026,
see docs/remote_sampling.md) and decides how they are asked:

- All of them take a prompt as token ids and keep the end token in ``token_ids`` and ``logprobs``; TensorRT-LLM drops a
  token of ``stop_token_ids`` unless ``include_stop_str_in_output`` is set. vLLM (``return_token_ids``, 0.10.2; before
  that ``return_tokens_as_token_ids``: "token_id:123" for every token) and SGLang (``return_token_ids``) return ids on
  request, TensorRT-LLM with ``detokenize: false``; it refuses fields it does not know.
- vLLM and TensorRT-LLM may take defaults of sampling from the model's generation_config.json: every parameter that
  changes the law is therefore sent.
- vLLM splits a request with ``n`` into n such requests, the i-th with the seed + i. SGLang's deterministic mode would
  give all n outputs of a request the same draws.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from transformers import PreTrainedTokenizerFast

from nemo_brain.config.remote import RemoteConfig
from nemo_brain.core.groups import Output, Prompt, SampledGroup
from nemo_brain.core.http import BadAnswer
from nemo_brain.core.together import AGAIN_SECONDS, together
from nemo_brain.sampling.answers import Reader
from nemo_brain.sampling.pool import Pool, ServedWeights
from nemo_brain.sampling.server import Server

if TYPE_CHECKING:
    from nemo_brain.sampling.sampler import SamplingOptions

# What each server is told beyond what all of them are: no top-k, and token ids in the answer.
_DIALECTS: dict[str, tuple[int, dict[str, Any]]] = {
    "vllm": (-1, {"return_token_ids": True, "return_tokens_as_token_ids": True}),
    "sglang": (-1, {"return_token_ids": True}),
    "trtllm": (0, {"detokenize": False}),
}
_POLL_SECONDS = 1.0
PROBE = -2  # the "iteration" of a probe's draws: the same whenever a server is looked at


def request_seed(seed: int, iteration: int, prompt_id: str, output: int) -> int:
    """The seed of one output: 53 bits, which every JSON library keeps.

    Those of a prompt's outputs follow one another, as a server counts them within a request: an output's seed does not
    depend on how many are asked for together, and no two outputs of a prompt share one. Other prompts' are apart but
    by chance, once in 2^52 over twice the number of outputs.
    """
    key = hashlib.blake2b(f"{seed}\x1f{iteration}\x1f{prompt_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(key, "little") >> 12) + output


@dataclass(frozen=True)
class Answer:
    """An output, the sum of the server's log-probs in nats, and the optimizer steps behind the weights that began
    it."""

    output: Output
    logprob: float
    step: int


class RemoteSampler:
    """Samples groups from the model that ``rollout.remote`` serves.

    Args:
        config: where and how to ask.
        options: what to sample; ``rows_in_flight`` is not used, ``config.concurrency`` is.
        tokenizer: turns ids into text.
        vocab_size: the model's, without padding; the servers may not return other ids.
        context: so many tokens a prompt and its output may have together.
        weights: that the servers are to have.

    Raises:
        ValueError: the environment variable of the API key is not set.
    """

    def __init__(
        self,
        config: RemoteConfig,
        options: SamplingOptions,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        context: int = 0,
        weights: ServedWeights | None = None,
    ):
        self.config = config
        self.options = options
        self._reader = Reader(options, tokenizer, vocab_size)
        self._servers = [Server(config, url, context) for url in config.urls]
        self._weights = weights or ServedWeights()

    def refresh(self, reload: bool) -> list[str]:
        """Sees to it that the servers have the weights, and waits until they serve them, for up to ``timeout_seconds``.

        Args:
            reload: ``rollout.remote.reload`` is carried out, otherwise only where a server says that its weights are
                other ones.

        Returns:
            The addresses of those that answer: all, or at least one of several.

        Raises:
            ValueError: a step failed, or a server does not come back, or without ``rollout.remote.model``, or with too
                short a context.
        """
        pool = Pool(self._servers, self._weights, self.config.concurrency)
        outcome: queue.SimpleQueue = queue.SimpleQueue()
        with in_background(lambda: pool.bring(reload), outcome):
            if (error := outcome.get()) is not None:
                raise error
        return pool.urls

    @property
    def waiting(self) -> list[Server]:
        """The servers that are there and lack the weights, which a transfer has to give them."""
        return [server for server in self._servers if server.waiting]

    def probe(self, urls: Sequence[str], prompts: Sequence[Prompt], seed: int) -> dict[str, list[SampledGroup]]:
        """Each server's output for each prompt, by its address: what its weights and its log-probs are to be seen from.

        A server that is ``waiting`` for the weights again meanwhile is left out.

        Raises:
            ValueError: as ``sample``.
        """
        groups: dict[str, list[SampledGroup]] = {}
        for server in self._servers:
            if server.url in urls:
                alone = copy.copy(self)
                alone._servers = [server]
                found: dict[int, SampledGroup] = {}
                sampling: Any = alone.sample(prompts, seed, PROBE, [[0]] * len(prompts))
                with contextlib.closing(sampling) as answers:
                    for answer in answers:
                        if answer is not None:
                            found |= [answer]
                        elif server.waiting:
                            break
                if len(found) == len(prompts):
                    groups[server.url] = [found[p] for p in range(len(prompts))]
        return groups

    def sample(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        iteration: int,
        numbers: Sequence[Sequence[int]] | None = None,
        on_outputs: Callable[[int], None] = lambda count: None,
        reload: bool = False,
    ) -> Iterator[tuple[int, SampledGroup] | None]:
        """Outputs for each prompt, as they are finished: pairs of a prompt's index and its group, or None where none
        was finished for a second.

        Requests go on in the background while the caller works on a group; closing the iterator cancels them. The
        same seed, iteration, prompt id and number ask for the same draw, whatever the others are. ``on_outputs`` is
        told how many outputs have come since its last call, in the caller's thread. ``proposal_logprobs`` are sums of
        the server's log-probs.

        Args:
            numbers: of each prompt's outputs; None: 0 to n - 1.
            reload: the servers are given the weights anew first.

        Raises:
            ValueError: no usable answer within the limits of the configuration; names the prompt.
        """
        wanted = [range(self.options.outputs)] * len(prompts) if numbers is None else numbers
        left = sum(map(len, wanted))
        finished: queue.SimpleQueue = queue.SimpleQueue()

        async def work() -> None:
            async with self.connected(reload) as (pool, client):

                async def draw(p: int, numbers: range) -> None:
                    finished.put((p, await self.outputs(pool, client, prompts[p], numbers, seed, iteration)))

                await together(draw(p, run) for p, outputs in enumerate(wanted) for run in self.requests(outputs))

        answers: list[dict[int, Answer]] = [{} for _ in prompts]
        with in_background(work, finished):
            while left:
                try:
                    item = finished.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if item is None or isinstance(item, BaseException):
                    raise item or AssertionError("every output is waited for")
                p, outputs_found = item
                left -= len(outputs_found)
                answers[p] |= outputs_found
                on_outputs(len(outputs_found))
                if len(answers[p]) == len(wanted[p]):
                    yield p, group_of(prompts[p], [answers[p].pop(index) for index in wanted[p]])

    @contextlib.asynccontextmanager
    async def connected(self, reload: bool = False) -> AsyncIterator[tuple[Pool, httpx.AsyncClient]]:
        """The servers, watched, and connections to them, for ``outputs``; as many requests at a time as may be. reload:
        they are given the weights anew first."""
        pool = Pool(self._servers, self._weights, self.config.concurrency)
        if reload:
            await pool.bring(reload)
        async with self._servers[0].client(self.config.concurrency * len(self._servers)) as client, pool.watched():
            yield pool, client

    def requests(self, numbers: Sequence[int]) -> Iterator[range]:
        """The numbers of a prompt's outputs, in runs of consecutive ones: each is asked for by one request."""
        first = 0
        for i in range(1, len(numbers) + 1):
            if i == len(numbers) or i - first == self.config.outputs_per_request or numbers[i] != numbers[i - 1] + 1:
                yield range(numbers[first], numbers[i - 1] + 1)
                first = i

    async def outputs(
        self,
        pool: Pool,
        client: httpx.AsyncClient,
        prompt: Prompt,
        numbers: range,
        seed: int,
        iteration: int,
    ) -> dict[int, Answer]:
        """The outputs of one request, by their numbers; it is repeated as a whole. Raises as ``sample``."""

        def request(server: Server) -> Awaitable[list[Answer]]:
            step = self._weights.step

            def read(answer: Any) -> list[Answer]:
                return [Answer(*output, step) for output in self._read(answer, prompt, len(numbers))]

            return server.ask(client, "POST", "/v1/completions", what, read, body)

        body = self._body(prompt, request_seed(seed, iteration, prompt.id, numbers[0]), len(numbers))
        what = f"prompt {prompt.id!r}, output {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
        tokens = len(prompt.token_ids) + len(numbers) * self.options.max_new_tokens
        return dict(zip(numbers, await pool.ask(what, tokens, request), strict=True))

    def _body(self, prompt: Prompt, seed: int, outputs: int) -> dict[str, Any]:
        every_token, dialect = _DIALECTS[self.config.server]
        return {
            "model": self.config.model,
            "prompt": prompt.token_ids,
            "n": outputs,
            "max_tokens": self.options.max_new_tokens,
            "min_tokens": 0,
            "seed": seed,
            "temperature": self.options.temperature,
            "top_k": self.options.top_k or every_token,
            "top_p": self.options.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(self.options.stop.strings),
            "stop_token_ids": list(self.options.stop.token_ids),
            "include_stop_str_in_output": True,
            "ignore_eos": False,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "logprobs": 1,
            "echo": False,
            "stream": False,
            **dialect,
        }

    def _read(self, answer: Any, prompt: Prompt, outputs: int) -> list[tuple[Output, float]]:
        """The outputs in an answer, in their order; BadAnswer where anything about it cannot be."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list):
            raise BadAnswer(f"no choices in {str(answer)[:200]}")
        if len(choices) != outputs:
            raise BadAnswer(f"{len(choices)} choices, {outputs} {'was' if outputs == 1 else 'were'} asked for")
        numbers = [choice.get("index", 0) if isinstance(choice, dict) else None for choice in choices]
        if any(number not in numbers for number in range(outputs)):
            raise BadAnswer(f"the choices are numbered {numbers}, not 0 to {outputs - 1}")
        return [self._reader.output(choices[numbers.index(number)], prompt) for number in range(outputs)]


def group_of(prompt: Prompt, answers: Sequence[Answer]) -> SampledGroup:
    """A prompt's group, with the servers' log-probs."""
    return SampledGroup(
        prompt,
        [answer.output for answer in answers],
        proposal_logprobs=[answer.logprob for answer in answers],
        policy_steps=[answer.step for answer in answers],
    )


@contextlib.contextmanager
def in_background(work: Callable, outcome: queue.SimpleQueue) -> Iterator[asyncio.AbstractEventLoop]:
    """Runs the coroutine function in a thread and an event loop of its own; its error, or None at its end, is put into
    ``outcome``.

    Leaving the context cancels it and waits for that: no request outlives it.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work())

    def run() -> None:
        try:
            loop.run_until_complete(task)
            outcome.put(None)
        except asyncio.CancelledError:
            outcome.put(RuntimeError("ended by nobody"))  # which nobody reads who has left the context
        except BaseException as error:  # the caller raises it
            outcome.put(error)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    # A daemon: whatever happens here does not keep a failed process alive.
    thread = threading.Thread(target=run, name="rollout.remote", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        while thread.is_alive():  # being cancelled once may not end it: see ``together``
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(task.cancel)
            thread.join(AGAIN_SECONDS)
