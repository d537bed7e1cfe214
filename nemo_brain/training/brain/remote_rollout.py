"""Groups from inference servers for all ranks of a run: new weights for the servers, their answers for the ranks.

The first rank of each data-parallel replica asks the servers for the replica's share. While they work on the rest, the
replica's ranks score what has come: see ``engine``.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_brain.config.brain import Config, RemoteConfig
from nemo_brain.convert.export import export_model, gathered_tensors, make_export
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.ranks import on_first_rank
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.server import Server
from nemo_brain.sampling.transfer import Transfer
from nemo_brain.training.brain.engine import EngineRollout, probe_options
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import export_for

_EXPORT_KEY = "rollout.remote.export_to"
_TRANSFERS = 3  # in a row, each of which has lost all servers meanwhile


class RemoteRollout(EngineRollout):
    """Samples from the servers of ``rollout.remote``.

    Args:
        config: the run's, and that section of it.
        gpt, weights: of the policy.
        stop: what ends its outputs.
        block: so many row positions are scored at a time.

    Raises:
        ValueError: the model cannot be exported for the servers, the directory for it is taken, or the API key is not
            set.
    """

    def __init__(self, config: Config, remote: RemoteConfig, gpt: GPTConfig, weights: Weights, stop: Stop, block: int):
        # Otherwise the servers have the weights that they have, and their log q' are all that is known of the law.
        held = remote.follows or config.rollout.refresh == "never" or config.rollout.rescore_proposal
        super().__init__(config, "rollout.remote", ", ".join(remote.urls), held, remote.on_mismatch, block)
        self.config = remote
        self._context = sum(config.lengths.values())
        self._adapted = config.model.peft is not None
        self._weights = weights
        self._run = uuid.uuid4().hex[:8]
        self._version: str | None = None
        self._step: int | None = None
        for url in remote.urls:
            Server(remote, url, self._context)
        self._export = export_for(_EXPORT_KEY, remote.export_to, gpt, weights, stop.token_ids)
        if remote.transfer == "process_group":
            self._export = make_export(gpt, weights.vocab_size, weights.tokenizer, "rollout.remote")

    @property
    def follows(self) -> bool:
        """Whether the servers get the policy's weights."""
        return self._export is not None

    def refresh(
        self,
        strategy: BRAInStrategy,
        step: int,
        options: SamplingOptions,
        prompts: Sequence[Prompt],
        interruption: Interruption,
    ) -> dict[str, float]:
        """See ``EngineRollout.refresh``. Servers that have the weights, by their versions, are not given them again."""
        changed = self._export is not None and step != self._step
        self._moved = self._moving = 0.0
        if self._export is not None and changed:
            strategy.wait_for_param_gather()
            self._version = on_first_rank(lambda: f"{self._run}-{step}")
            if self.config.export_to is not None:
                started = time.perf_counter()
                self._moved = export_model(strategy.chunks, self._export, self.config.export_to)
                self._moving = time.perf_counter() - started
        self._remember(prompts)
        problem = self._bring(strategy, options, interruption, reload=changed)
        if problem and self._export is not None:  # what it had it has lost; by its version, if it was new
            problem = self._bring(strategy, options, interruption, reload=not changed)
        if problem:
            raise ValueError(problem)
        self._step = step
        if not self.follows:
            return {}
        rate = self._moved / self._moving if self._moved else 0.0
        return {"refresh_bytes": self._moved, "refresh_bytes_per_second": rate}

    def _bring(
        self, strategy: BRAInStrategy, options: SamplingOptions, interruption: Interruption, reload: bool
    ) -> str | None:
        """What is wrong with the law that a server samples from, once it was given the weights; None: nothing."""
        while True:
            urls = self._given(strategy, options, interruption, reload)
            if not self._held:
                return None
            probe = functools.partial(self._sampler(probe_options(options)).probe, urls, self._prompts, seed=0)
            probes = on_first_rank(probe, interruption=interruption)
            if len(probes) == len(urls):
                return self._problem(strategy, probes, options.temperature)
            reload = False  # one was started again meanwhile, as its version says

    def _given(
        self, strategy: BRAInStrategy, options: SamplingOptions, interruption: Interruption, reload: bool
    ) -> list[str]:
        """The addresses of the servers that have the weights now."""
        sampler = self._sampler(options)
        for _ in range(_TRANSFERS):
            started = time.perf_counter()
            urls = on_first_rank(lambda: sampler.refresh(reload), interruption=interruption)
            if self.config.export_to is not None:
                self._moving += time.perf_counter() - started
            if not on_first_rank(lambda: bool(sampler.waiting)):
                return urls
            lost = self._transfer(strategy, sampler, None, interruption)
            if len(lost) < len(urls):
                return [url for url in urls if url not in lost]
        raise ValueError(
            f"rollout.remote: {', '.join(self.config.urls)}: lost {_TRANSFERS} times in a row when they were given "
            "the policy's weights: see their logs"
        )

    def _transfer(
        self,
        strategy: BRAInStrategy,
        sampler: RemoteSampler,
        replica: dist.ProcessGroup | None,
        interruption: Interruption | None = None,
    ) -> list[str]:
        """Gives the servers that wait for them the weights. A collective of ``replica``, or, if it is None, of all
        ranks, of which the first replica gathers.

        Returns:
            The addresses of those that were lost meanwhile.
        """
        assert self._export is not None
        transfer: Transfer | None = None

        def join() -> tuple[list[str], bool]:
            nonlocal transfer
            servers = sampler.waiting
            adapted = self._adapted and all(server.waiting == "changed" for server in servers)
            transfer = Transfer(servers, str(self._version))
            return [server.url for server in servers], adapted

        def finish() -> list[str]:
            return transfer.finish() if transfer else []

        urls, adapted = on_first_rank(join, replica, interruption)
        if replica is not None or parallel_state.get_data_parallel_rank() == 0:
            for name, tensor in gathered_tensors(strategy.chunks, self._export, adapted):
                assert transfer is not None  # only its first rank is given any
                transfer.add(name, tensor)
        done = on_first_rank(finish, replica, interruption)
        if transfer is not None:
            self._moved, self._moving = self._moved + transfer.bytes, self._moving + transfer.seconds
        return [url for url in urls if url not in done]

    def _drawn(
        self,
        strategy: BRAInStrategy,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        seed: int,
        iteration: int,
        numbers: Sequence[Sequence[int]],
        on_outputs: Callable[[int], None],
        stop: Callable[[], bool],
        again: bool,
    ) -> Iterator[list[tuple[int, SampledGroup]]]:
        """The first rank asks the servers, and the others are told."""
        sampler = self._sampler(options)
        blocks = self._blocks(sampler.sample(prompts, seed, iteration, numbers, on_outputs, again))
        for block, waits in _on_all_ranks(blocks, lambda: bool(sampler.waiting), stop):
            if waits:  # a server that has come back, and can be given weights by all ranks only
                self._transfer(strategy, sampler, parallel_state.get_model_parallel_group())
            yield block

    def _sampler(self, options: SamplingOptions) -> RemoteSampler:
        weights, directory = self._weights, self.config.export_to
        return RemoteSampler(
            self.config, options, weights.tokenizer, weights.vocab_size, self._context, directory, self._version
        )


def _on_all_ranks(
    blocks: Iterator[list], question: Callable[[], bool], stop: Callable[[], bool]
) -> Iterator[tuple[list, bool]]:
    """The first rank's blocks on all ranks of the replica, until ``stop``, and what it answers to the question; its
    ValueError too."""
    members = parallel_state.get_model_parallel_group()
    while True:
        message: list = [None, False]
        if members.rank() == 0:
            try:
                message = [next(blocks, None), question()]
            except ValueError as error:
                message = [error, False]
        if members.size() > 1:
            dist.broadcast_object_list(message, dist.get_process_group_ranks(members)[0], group=members)
        block, answer = message
        if block is None or stop():
            return
        if isinstance(block, ValueError):
            raise block
        yield block, answer
