"""Groups from inference servers for all ranks of a run: new weights for the servers, their answers for the ranks.

The first rank of each data-parallel replica asks the servers for the replica's share. While they work on the rest, the
replica's ranks score what has come with the model that the servers are to have, the policy or the prior, and so see
which law has drawn it: an output whose log-prob there is another one is not taken for the model's.

Shapes: E temperatures, G groups, N outputs per group.
"""

from __future__ import annotations

import contextlib
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_brain.config.brain import Config, RemoteConfig
from nemo_brain.convert.export import export_model, gathered_tensors, make_export
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.core.ranks import on_first_rank
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.server import Server
from nemo_brain.sampling.transfer import Transfer
from nemo_brain.training.brain.provenance import OUTLIER, diagnosis, gap_per_token, output_gaps
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import export_for

_EXPORT_KEY = "rollout.remote.export_to"
_ATTEMPTS = 4  # an output is drawn at most so many times
_TRANSFERS = 3  # in a row, each of which has lost all servers meanwhile
_PROBES, _PROBE_TOKENS = 4, 16  # prompts that every server is asked for before it samples, and tokens of each output


class RemoteRollout:
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
        self.config = remote
        self._context = sum(config.lengths.values())
        self._max_gap = config.max_proposal_gap
        self._layout = config.layout
        self._of_prior = config.rollout.refresh == "never"
        # Otherwise the servers have the weights that they have, and their log q' are all that is known of the law.
        self._held = remote.follows or self._of_prior or config.rollout.rescore_proposal
        self._adapted = config.model.peft is not None
        self._block = block
        self._weights = weights
        self._run = uuid.uuid4().hex[:8]
        self._version: str | None = None
        self._step: int | None = None
        self._prompts: list[Prompt] = []
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
        """Gives the servers the policy as it stands after ``step`` optimizer steps, and looks whether they have it.

        A collective of all ranks.

        Returns:
            Metrics of it, on rank 0.

        Args:
            prompts: some that are to be sampled for; the first of the first call are asked for from then on, whose
                prefixes a server may have kept.

        Raises:
            ValueError, OSError: on every rank, when the export or a server's reload failed, or a server samples from
                another law.
            Interrupted: on every rank, when the run was asked to end meanwhile.
        """
        changed = self._export is not None and step != self._step
        self._moved = self._moving = 0.0
        if self._export is not None and changed:
            strategy.wait_for_param_gather()
            self._version = on_first_rank(lambda: f"{self._run}-{step}")
            if self.config.export_to is not None:
                started = time.perf_counter()
                self._moved = export_model(strategy.chunks, self._export, self.config.export_to)
                self._moving = time.perf_counter() - started
        self._prompts = self._prompts or list(prompts[:_PROBES])
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
        tokens = min(options.max_new_tokens, _PROBE_TOKENS)
        short = replace(options, outputs=1, max_new_tokens=tokens, top_k=0, top_p=1.0)
        urls, probes = [""], {}  # type: tuple[list[str], dict[str, list[SampledGroup]]]
        while len(probes) < len(urls):  # or one was started again meanwhile
            urls = self._given(strategy, options, interruption, reload)
            if not self._held:
                return None
            probes = on_first_rank(
                lambda: self._sampler(short).probe(urls, self._prompts, seed=0), interruption=interruption
            )
            reload = False
        groups = [group for answers in probes.values() for group in answers]
        ours = self._scored(strategy, groups, options.temperature)
        count = len(self._prompts)
        for number, (url, answers) in enumerate(probes.items()):
            mine = slice(number * count, (number + 1) * count)
            gap = gap_per_token(answers, ours[-1][mine])
            if gap <= self._max_gap:
                continue
            with strategy.prior() as score:
                of_start = score(groups, lambda tokens: None, (options.temperature,))[0].tolist()
            reason = diagnosis(
                raw=options.temperature != 1.0 and gap_per_token(answers, ours[0][mine]) <= self._max_gap,
                start=not self._of_prior and gap_per_token(answers, of_start[mine]) <= self._max_gap,
            )
            model = "the start model" if self._of_prior else "the policy"
            return (
                f"rollout.remote: {url}: its log-probs of {count} outputs of its own are {gap:.3g} nats per token away "
                f"from those of {model} (rollout.max_proposal_gap is {self._max_gap:g}): {reason}. Nothing was "
                "trained on its outputs"
            )
        return None

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

    def sample(
        self,
        strategy: BRAInStrategy,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        seed: int,
        iteration: int,
        on_outputs: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, SampledGroup]]:
        """As ``Sampler.sample``, with what the ranks have scored too.

        Raises:
            ValueError: on every rank of the replica, when the servers gave no usable answer, or outputs of another law.
        """
        n = options.outputs
        members = parallel_state.get_model_parallel_group()
        places = list(range(len(prompts)))
        wanted = [list(range(n)) for _ in prompts]
        found: dict[int, SampledGroup] = {}
        with self._scorer(strategy, options.temperature) as score:
            for attempt in range(_ATTEMPTS):
                numbers = [[attempt * n + i for i in outputs] for outputs in wanted]
                arguments = ([prompts[place] for place in places], seed, iteration, numbers, on_outputs, attempt > 0)
                sampler = self._sampler(options)
                blocks = self._blocks(sampler, *arguments)
                wrong: dict[int, list[int]] = {}
                for block, waits in _on_all_ranks(blocks, lambda: bool(sampler.waiting), stop):
                    if waits:  # a server that has come back, and can be given weights by all ranks only
                        self._transfer(strategy, sampler, members)
                    for (k, _), group in zip(block, score([group for _, group in block]), strict=True):
                        group, bad = self._checked(group, options)
                        place = places[k]
                        group = group if attempt == 0 else _replaced(found[place], wanted[k], group)
                        if bad:
                            found[place], wrong[place] = group, [wanted[k][j] for j in bad]
                        else:
                            yield place, group
                if not wrong or stop():
                    return
                places, wanted = list(wrong), list(wrong.values())
        raise ValueError(
            f"rollout.remote: {', '.join(self.config.urls)}: prompt {prompts[places[0]].id!r}: {_ATTEMPTS} outputs in "
            f"a row whose log-probs are not those of the model, by more than {OUTLIER:g} times "
            f"rollout.max_proposal_gap={self._max_gap:g} nats per token: "
            f"{diagnosis(raw=False, start=False)}"
        )

    def _checked(self, group: SampledGroup, options: SamplingOptions) -> tuple[SampledGroup, list[int]]:
        """The group, and which of its outputs the model has not drawn, by their log-probs."""
        if not self._held or options.truncated:  # the log-probs are of a law that is not computed here
            return replace(group, rescored_logprobs=None), []
        assert group.rescored_logprobs is not None and group.proposal_logprobs is not None
        limit = OUTLIER * self._max_gap
        bad = [i for i, gap in enumerate(output_gaps(group, group.rescored_logprobs)) if not gap <= limit]
        if not bad:
            return group, []
        keep = self.config.on_mismatch == "keep"
        what = "are kept with the server's log q'" if keep else "are asked for again"
        warnings.warn(f"rollout.remote: {len(bad)} outputs of another law than the model's {what}", stacklevel=2)
        if keep:
            values = [
                group.proposal_logprobs[i] if i in bad else ours for i, ours in enumerate(group.rescored_logprobs)
            ]
            return replace(group, rescored_logprobs=values), []
        return group, bad

    @contextlib.contextmanager
    def _scorer(self, strategy: BRAInStrategy, temperature: float) -> Iterator[Callable[..., list[SampledGroup]]]:
        """Adds the log-probs that the ranks of this replica compute: ``f(groups)``."""
        temperatures = _temperatures(temperature)
        with contextlib.ExitStack() as stack:
            if self._of_prior:
                prior = stack.enter_context(strategy.prior(alone=True))
            else:
                strategy.wait_for_param_gather()

            def score(groups: Sequence[SampledGroup]) -> list[SampledGroup]:
                if not groups or not self._held:
                    return list(groups)
                if self._of_prior:
                    values_EGN = prior(groups, lambda tokens: None, temperatures)
                else:
                    values_EGN = strategy.policy_logprobs(groups, temperatures, lambda tokens: None, alone=True)
                plain, ours = values_EGN[0].tolist(), values_EGN[-1].tolist()
                name = "prior_logprobs" if self._of_prior else "policy_logprobs"
                scored = []
                for group, first, last in zip(groups, plain, ours, strict=True):
                    n = len(group.outputs)
                    scored.append(replace(group, rescored_logprobs=last[:n], **{name: first[:n]}))
                return scored

            yield score

    def _scored(self, strategy: BRAInStrategy, groups: Sequence[SampledGroup], temperature: float) -> list[list]:
        """The model's log-probs at temperature 1 and the proposal's, [E, G, N]. A collective of all ranks."""
        temperatures = _temperatures(temperature)
        if not self._of_prior:
            return strategy.policy_logprobs(groups, temperatures, lambda tokens: None).tolist()
        with strategy.prior() as score:
            return score(groups, lambda tokens: None, temperatures).tolist()

    def _blocks(self, sampler: RemoteSampler, *arguments: Any) -> Iterator[list[tuple[int, SampledGroup]]]:
        """What the servers have finished, enough for a scoring pass at a time; nothing where they are waited for."""
        block: list[tuple[int, SampledGroup]] = []
        positions = 0
        for answer in sampler.sample(*arguments):
            if answer is None:
                yield []
                continue
            _, group = answer
            block.append(answer)
            positions += chunk_tokens(group, range(len(group.outputs)), self._layout)
            if positions >= self._block:
                yield block
                block, positions = [], 0
        if block:
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


def _temperatures(temperature: float) -> tuple[float, ...]:
    return (1.0,) if temperature == 1.0 else (1.0, temperature)


def _replaced(group: SampledGroup, outputs: Sequence[int], drawn: SampledGroup) -> SampledGroup:
    """The group with these of its outputs, and all that is known of them, drawn anew."""

    def merged(name: str) -> Any:
        old, new = getattr(group, name), getattr(drawn, name)
        if old is None or new is None:
            return None
        by_place = dict(zip(outputs, new, strict=True))
        return [by_place.get(i, value) for i, value in enumerate(old)]

    names = ("outputs", "proposal_logprobs", "rescored_logprobs", "policy_logprobs", "prior_logprobs")
    return replace(group, **{name: merged(name) for name in names})
