"""Groups from inference servers for all ranks of a run: new weights for the servers, their answers for the ranks.

The first rank of each data-parallel replica asks the servers for the replica's share. While they work on the rest, the
replica's ranks score what has come: see ``engine``.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_brain.config.brain import Config
from nemo_brain.config.remote import RemoteConfig
from nemo_brain.convert.export import export_model, gathered_tensors, make_export
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.ranks import on_all_ranks, on_first_rank
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.ahead import AheadSampler
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.server import Server
from nemo_brain.sampling.transfer import Transfer
from nemo_brain.training.brain.engine import Draws, EngineRollout, probe_options
from nemo_brain.training.brain.provenance import repeated_gap
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.model import export_for

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
        directory = None if remote.export_to is None else Path(remote.export_to).resolve()
        self._holds = config.rollout.ahead > 0
        self._served = ServedWeights(directory, named=self._holds)
        self._step: int | None = None
        self._ahead: AheadSampler | None = None
        self._probes: tuple[SamplingOptions, dict[str, list[SampledGroup]]] | None = None
        for url in remote.urls:
            Server(remote, url, self._context)
        self._export = export_for(_EXPORT_KEY, remote.export_to, gpt, weights, stop.token_ids)
        if remote.transfer == "process_group":
            self._export = make_export(gpt, weights.vocab_size, weights.tokenizer, "rollout.remote")

    @property
    def follows(self) -> bool:
        """Whether the servers get the policy's weights."""
        return self._export is not None and self._refresh == "always"

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
        if changed and self._holds and self._probes is not None:
            last = self._probes
            on_first_rank(lambda: self._hold(*last), interruption=interruption)
        self._moved = self._moving = 0.0
        if self._export is not None and changed:
            version = on_first_rank(lambda: f"{self._run}-{step}")
            on_all_ranks(lambda: self._served.replace(version))  # every replica's requests see to it
            if self.config.export_to is not None:
                started = time.perf_counter()
                with self._model(strategy) as chunks:
                    self._moved = export_model(chunks, self._export, self.config.export_to)
                self._moving = time.perf_counter() - started
        self._remember(prompts)
        # What it had it has lost; what it has just got only by a start in between, after which it says so; and it may
        # be started once more.
        for reload in (changed, not changed, False):
            problem = self._bring(strategy, options, interruption, reload)
            if problem is None or self._export is None:
                break
        if problem is not None:
            raise ValueError(problem)
        self._served.settle(step)
        self._step = step
        if self._export is None:
            return {}
        rate = self._moved / self._moving if self._moved else 0.0
        return {"refresh_bytes": self._moved, "refresh_bytes_per_second": rate}

    def begin(
        self, prompts: Sequence[Prompt], options: SamplingOptions, seed: int, iteration: int
    ) -> Iterator[tuple[int, SampledGroup]]:
        """The groups of an iteration to come, as ``AheadSampler.begin``. On a replica's first rank alone.

        The ranks cannot score them with the weights that drew them, which they no longer have.
        """
        if self._ahead is None:
            self._ahead = AheadSampler(self._sampler(options), seed)
        return self._ahead.begin(iteration, prompts)

    def close(self) -> None:
        """Ends what ``begin`` has begun."""
        if self._ahead is not None:
            self._ahead.close()

    @property
    def lacking(self) -> bool:
        return self._ahead is not None and bool(self._ahead.sampler.waiting)

    def mend(self, strategy: BRAInStrategy) -> None:
        self._transfer(strategy, lambda: self._ahead.sampler.waiting if self._ahead else [], None)

    def _bring(
        self, strategy: BRAInStrategy, options: SamplingOptions, interruption: Interruption, reload: bool
    ) -> str | None:
        """What is wrong with the law that a server samples from, once it was given the weights; None: nothing."""
        while True:
            urls = self._given(strategy, options, interruption, reload)
            if not self._held:
                return None
            probes = on_first_rank(functools.partial(self._probed, urls, options), interruption=interruption)
            if len(probes) == len(urls):
                problem = self._problem(strategy, probes, options.temperature)
                self._probes = self._probes if problem else (options, probes)
                return problem
            reload = False  # one was started again meanwhile, as its version says

    def _probed(self, urls: Sequence[str], options: SamplingOptions) -> dict[str, list[SampledGroup]]:
        return self._sampler(probe_options(options)).probe(urls, self._prompts, seed=0)

    def _hold(self, options: SamplingOptions, probes: dict[str, list[SampledGroup]]) -> None:
        """ValueError where a server answers its last probe otherwise than it did: it has been sampling from weights of
        its own since, under the name of the policy's."""
        for _ in range(2):  # between the two questions a server may have been started again
            sampler = self._sampler(options)
            urls = sampler.refresh(reload=False)
            lacking = {server.url for server in sampler.waiting}  # for weights that the policy no longer has
            there = [url for url in urls if url in probes and url not in lacking]
            answers = self._probed(there, options)
            gaps = {url: repeated_gap(probes[url], groups) for url, groups in answers.items()}
            if all(gap <= self._max_gap for gap in gaps.values()):
                return
        url = max(gaps, key=lambda url: gaps[url])
        raise ValueError(
            f"rollout.remote: {url}: asked for the outputs of its last probe once more, it gives others, or log-probs "
            f"that are {gaps[url]:.3g} nats per token away (rollout.max_proposal_gap is {self._max_gap:g}): its "
            "weights were changed under the name that they had. Outputs that it has sampled ahead since are not "
            "trained on"
        )

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
            lost = self._transfer(strategy, lambda: sampler.waiting, None, interruption)
            if len(lost) < len(urls):
                return [url for url in urls if url not in lost]
        raise ValueError(
            f"rollout.remote: {', '.join(self.config.urls)}: lost {_TRANSFERS} times in a row when they were given "
            "the policy's weights: see their logs"
        )

    def _transfer(
        self,
        strategy: BRAInStrategy,
        waiting: Callable[[], list[Server]],
        replica: dist.ProcessGroup | None,
        interruption: Interruption | None = None,
    ) -> list[str]:
        """Gives the servers that wait for them, as the first rank knows, the weights. A collective of ``replica``, or,
        if it is None, of all ranks, of which the first replica gathers.

        Returns:
            The addresses of those that were lost meanwhile.
        """
        assert self._export is not None
        transfer: Transfer | None = None

        def join() -> tuple[list[str], bool]:
            nonlocal transfer
            servers = waiting()
            adapted = self._adapted and all(server.waiting == "changed" for server in servers)
            transfer = Transfer(servers, str(self._served.version))
            return [server.url for server in servers], adapted

        def finish() -> list[str]:
            return transfer.finish() if transfer else []

        urls, adapted = on_first_rank(join, replica, interruption)
        if replica is not None or parallel_state.get_data_parallel_rank() == 0:
            with self._model(strategy) as chunks:
                for name, tensor in gathered_tensors(chunks, self._export, adapted):
                    assert transfer is not None  # only its first rank is given any
                    transfer.add(name, tensor)
        done = on_first_rank(finish, replica, interruption)
        if transfer is not None:
            self._moved, self._moving = self._moved + transfer.bytes, self._moving + transfer.seconds
        return [url for url in urls if url not in done]

    def _drawn(self, strategy: BRAInStrategy, draws: Draws) -> Iterator[list[tuple[int, SampledGroup]]]:
        """The first rank asks the servers, and the others are told."""
        sampler = self._sampler(draws.options)
        asked = (draws.prompts, draws.seed, draws.iteration, draws.numbers, draws.on_outputs, draws.again)
        blocks = self._blocks(sampler.sample(*asked))
        for block, waits in _on_all_ranks(blocks, lambda: bool(sampler.waiting), draws.stop):
            if waits:  # a server that has come back, and can be given weights by all ranks only
                self._transfer(strategy, lambda: sampler.waiting, parallel_state.get_model_parallel_group())
            yield block

    def _sampler(self, options: SamplingOptions) -> RemoteSampler:
        weights = self._weights
        return RemoteSampler(self.config, options, weights.tokenizer, weights.vocab_size, self._context, self._served)

    def _model(self, strategy: BRAInStrategy) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """That model, where servers are given one."""
        return strategy.proposal_chunks() if self._refresh == "kl_adaptive" else strategy.policy_chunks()


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
