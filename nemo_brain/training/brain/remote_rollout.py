"""Groups from inference servers for all ranks of a run: new weights for the servers, their answers for the ranks.

The first rank of each data-parallel replica asks the servers for the replica's share. While they work on the rest, the
replica's ranks score what has come with the model that the servers are to have, the policy, the prior or a proposal of
its own, and so see which law has drawn it: an output whose log-prob there is another one is not taken for the model's.

Shapes: E temperatures, G groups, N outputs per group.
"""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_brain.config.brain import Config, RemoteConfig
from nemo_brain.convert.export import export_model
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.core.ranks import on_all_ranks, on_first_rank
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.ahead import AheadSampler
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.server import Server
from nemo_brain.training.brain.provenance import OUTLIER, diagnosis, gap_per_token, output_gaps, repeated_gap
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import export_for

_EXPORT_KEY = "rollout.remote.export_to"
_ATTEMPTS = 4  # an output is drawn at most so many times
_MODELS = {"always": "the policy", "never": "the start model", "kl_adaptive": "the proposal"}
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
        self._refresh = config.rollout.refresh
        # Otherwise the servers have the weights that they have, and their log q' are all that is known of the law.
        self._held = remote.reload is not None or self._refresh == "never" or config.rollout.rescore_proposal
        self._block = block
        self._weights = weights
        self._run = uuid.uuid4().hex[:8]
        directory = None if remote.export_to is None else Path(remote.export_to).resolve()
        self._holds = config.rollout.ahead > 0
        self._served = ServedWeights(directory, named=self._holds)
        self._step: int | None = None
        self._prompts: list[Prompt] = []
        self._ahead: AheadSampler | None = None
        self._probes: tuple[SamplingOptions, dict[str, list[SampledGroup]]] | None = None
        for url in remote.urls:
            Server(remote, url, self._context)
        self._export = export_for(_EXPORT_KEY, remote.export_to, gpt, weights, stop.token_ids)

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
    ) -> None:
        """Gives the servers the model that they are to have, and looks whether they have it.

        A collective of all ranks.

        Args:
            step: optimizer steps behind that model.
            prompts: some that are to be sampled for; the first of the first call are asked for from then on, whose
                prefixes a server may have kept.

        Raises:
            ValueError, OSError: on every rank, when the export or a server's reload failed, or a server samples from
                another law.
            Interrupted: on every rank, when the run was asked to end meanwhile.
        """
        changed = self._export is not None and step != self._step
        if changed and self._holds and self._probes is not None:
            last = self._probes
            on_first_rank(lambda: self._hold(*last), interruption=interruption)
        if self._export is not None and changed:
            version = on_first_rank(lambda: f"{self._run}-{step}")
            on_all_ranks(lambda: self._served.replace(version))  # every replica's requests see to it
            with self._model(strategy) as chunks:
                export_model(chunks, self._export, str(self.config.export_to))
        self._prompts = self._prompts or list(prompts[:_PROBES])
        problem = self._bring(strategy, options, interruption, reload=changed)
        if problem and self._export is not None:
            # What it had it has lost; what it has just got only by a start in between, after which it says so.
            problem = self._bring(strategy, options, interruption, reload=not changed)
        if problem:
            raise ValueError(problem)
        self._served.settle(step)
        self._step = step

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

    def _bring(
        self, strategy: BRAInStrategy, options: SamplingOptions, interruption: Interruption, reload: bool
    ) -> str | None:
        """What is wrong with the law that a server samples from, once it was given the weights; None: nothing."""
        urls = on_first_rank(lambda: self._sampler(options).refresh(reload), interruption=interruption)
        if not self._held:
            return None
        probes = on_first_rank(lambda: self._probed(urls, options), interruption=interruption)
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
                start=self._refresh != "never" and gap_per_token(answers, of_start[mine]) <= self._max_gap,
            )
            return (
                f"rollout.remote: {url}: its log-probs of {count} outputs of its own are {gap:.3g} nats per token away "
                f"from those of {_MODELS[self._refresh]} (rollout.max_proposal_gap is {self._max_gap:g}): {reason}. "
                "Nothing was trained on its outputs"
            )
        self._probes = options, probes
        return None

    def _probed(self, urls: Sequence[str], options: SamplingOptions) -> dict[str, list[SampledGroup]]:
        tokens = min(options.max_new_tokens, _PROBE_TOKENS)
        short = replace(options, outputs=1, max_new_tokens=tokens, top_k=0, top_p=1.0)
        return self._sampler(short).probe(urls, self._prompts, seed=0)

    def _hold(self, options: SamplingOptions, probes: dict[str, list[SampledGroup]]) -> None:
        """ValueError where a server answers its last probe otherwise than it did: it has been sampling from weights of
        its own since, under the name of the policy's."""
        for _ in range(2):  # between the two questions a server may have been started again
            there = [url for url in self._sampler(options).refresh(reload=False) if url in probes]
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
        places = list(range(len(prompts)))
        wanted = [list(range(n)) for _ in prompts]
        found: dict[int, SampledGroup] = {}
        with self._scorer(strategy, options.temperature) as score:
            for attempt in range(_ATTEMPTS):
                numbers = [[attempt * n + i for i in outputs] for outputs in wanted]
                arguments = ([prompts[place] for place in places], seed, iteration, numbers, on_outputs, attempt > 0)
                blocks = self._blocks(self._sampler(options), *arguments)
                wrong: dict[int, list[int]] = {}
                for block in _on_all_ranks(blocks, stop):
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
        # What else they are known to be, at temperature 1; a proposal of its own is neither.
        name = {"always": "policy_logprobs", "never": "prior_logprobs"}.get(self._refresh)
        with self._logprobs(strategy, alone=True) as logprobs:

            def score(groups: Sequence[SampledGroup]) -> list[SampledGroup]:
                if not groups or not self._held:
                    return list(groups)
                values_EGN = logprobs(groups, lambda tokens: None, temperatures)
                plain, ours = values_EGN[0].tolist(), values_EGN[-1].tolist()
                scored = []
                for group, first, last in zip(groups, plain, ours, strict=True):
                    n = len(group.outputs)
                    known: dict[str, Any] = {name: first[:n]} if name else {}
                    scored.append(replace(group, rescored_logprobs=last[:n], **known))
                return scored

            yield score

    def _scored(self, strategy: BRAInStrategy, groups: Sequence[SampledGroup], temperature: float) -> list[list]:
        """The model's log-probs at temperature 1 and the proposal's, [E, G, N]. A collective of all ranks."""
        with self._logprobs(strategy, alone=False) as logprobs:
            return logprobs(groups, lambda tokens: None, _temperatures(temperature)).tolist()

    def _logprobs(self, strategy: BRAInStrategy, alone: bool) -> AbstractContextManager[Callable[..., torch.Tensor]]:
        """Log-probs of the model that the servers are to have, as ``BRAInStrategy.prior`` gives the prior's."""
        of = {"always": strategy.policy, "never": strategy.prior, "kl_adaptive": strategy.proposal}
        return of[self._refresh](alone)

    def _model(self, strategy: BRAInStrategy) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """That model, where servers are given one."""
        return strategy.proposal_chunks() if self._refresh == "kl_adaptive" else strategy.policy_chunks()

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
        weights = self._weights
        return RemoteSampler(self.config, options, weights.tokenizer, weights.vocab_size, self._context, self._served)


def _on_all_ranks(blocks: Iterator[list], stop: Callable[[], bool]) -> Iterator[list]:
    """The first rank's blocks on all ranks of the replica, until ``stop``; its ValueError too."""
    members = parallel_state.get_model_parallel_group()
    while True:
        message: list = [None]
        if members.rank() == 0:
            try:
                message = [next(blocks, None)]
            except ValueError as error:
                message = [error]
        if members.size() > 1:
            dist.broadcast_object_list(message, dist.get_process_group_ranks(members)[0], group=members)
        (block,) = message
        if block is None or stop():
            return
        if isinstance(block, ValueError):
            raise block
        yield block


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
