"""Groups from an engine that is not the training kernels', and whose outputs they are.

The ranks of a replica score what the engine has drawn with the model that it is to have, the policy or the prior, and
so see which law has drawn it: an output whose log-prob there is another one is not taken for the model's.

Shapes: E temperatures, G groups, N outputs per group.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_brain.config.brain import Config
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.provenance import OUTLIER, diagnosis, gap_per_token, output_gaps
from nemo_brain.training.brain.strategy import BRAInStrategy

_ATTEMPTS = 4  # an output is drawn at most so many times
_MODELS = {"always": "the policy", "never": "the start model", "kl_adaptive": "the proposal"}
_PROBES, _PROBE_TOKENS = 4, 16  # prompts that every engine samples for first, and tokens of each output


def probe_options(options: SamplingOptions) -> SamplingOptions:
    """Of the outputs by which an engine's law is known: short ones of the law before truncation."""
    tokens = min(options.max_new_tokens, _PROBE_TOKENS)
    return replace(options, outputs=1, max_new_tokens=tokens, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class Draws:
    """Outputs that an engine is to draw: of these numbers, for each prompt.

    Attributes:
        on_outputs: told how many have come since its last call.
        stop: asked now and then, on all ranks of the replica at the same point.
        again: the last ones were not the model's, so that the engine is given the weights anew.
    """

    prompts: Sequence[Prompt]
    options: SamplingOptions
    seed: int
    iteration: int
    numbers: Sequence[Sequence[int]]
    on_outputs: Callable[[int], None] = lambda count: None
    stop: Callable[[], bool] = lambda: False
    again: bool = False


class EngineRollout:
    """What ``rollout.engine`` ``server`` and ``colocated`` have in common.

    Args:
        config: the run's.
        section, who: what errors name: the key, and the engine.
        held: outputs are held to the model.
        on_mismatch: see ``rollout.remote.on_mismatch``.
        block: so many row positions are scored at a time.
    """

    def __init__(self, config: Config, section: str, who: str, held: bool, on_mismatch: str, block: int):
        self._section, self._who = section, who
        self._held = held
        self._on_mismatch = on_mismatch
        self._block = block
        self._max_gap = config.max_proposal_gap
        self._layout = config.layout
        self._refresh = config.rollout.refresh
        self._prompts: list[Prompt] = []

    @property
    def follows(self) -> bool:
        """Whether the engine gets the policy's weights."""
        raise NotImplementedError

    def refresh(
        self,
        strategy: BRAInStrategy,
        step: int,
        options: SamplingOptions,
        prompts: Sequence[Prompt],
        interruption: Interruption,
    ) -> dict[str, float]:
        """Gives the engine the policy as it stands after ``step`` optimizer steps, and looks whether it has it.

        A collective of all ranks.

        Args:
            prompts: some that are to be sampled for; the first of the first call are asked for from then on, whose
                prefixes an engine may have kept.

        Returns:
            Metrics of it, on rank 0.

        Raises:
            ValueError, OSError: on every rank, when the engine did not take the weights, or samples from another law.
            Interrupted: on every rank, when the run was asked to end meanwhile.
        """
        raise NotImplementedError

    def begin(
        self, prompts: Sequence[Prompt], options: SamplingOptions, seed: int, iteration: int
    ) -> Iterator[tuple[int, SampledGroup]]:
        """The groups of an iteration to come, for ``rollout.ahead``. On a replica's first rank alone."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what ``begin`` has begun."""

    @property
    def lacking(self) -> bool:
        """Whether what ``begin`` has begun waits, as far as this rank knows, for an engine that lacks the weights."""
        return False

    def mend(self, strategy: BRAInStrategy) -> None:
        """Gives it the policy as it stands, which has not changed since ``refresh``. A collective of all ranks."""

    def _drawn(self, strategy: BRAInStrategy, draws: Draws) -> Iterator[list[tuple[int, SampledGroup]]]:
        """The engine's outputs: some prompts' at a time, on all ranks of the replica."""
        raise NotImplementedError

    def _remember(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = self._prompts or list(prompts[:_PROBES])

    def _problem(
        self, strategy: BRAInStrategy, probes: Mapping[str, list[SampledGroup]], temperature: float
    ) -> str | None:
        """What is wrong with the law that an engine samples from, by what each has drawn for the first prompts, the
        same on all ranks; None: nothing. A collective of all ranks."""
        groups = [group for answers in probes.values() for group in answers]
        ours = self._scored(strategy, groups, temperature)
        count = len(self._prompts)
        for number, (who, answers) in enumerate(probes.items()):
            mine = slice(number * count, (number + 1) * count)
            gap = gap_per_token(answers, ours[-1][mine])
            if gap <= self._max_gap:
                continue
            with strategy.prior() as score:
                of_start = score(groups, lambda tokens: None, (temperature,))[0].tolist()
            reason = diagnosis(
                raw=temperature != 1.0 and gap_per_token(answers, ours[0][mine]) <= self._max_gap,
                start=self._refresh != "never" and gap_per_token(answers, of_start[mine]) <= self._max_gap,
            )
            return (
                f"{self._section}: {who}: its log-probs of {count} outputs of its own are {gap:.3g} nats per token "
                f"away from those of {_MODELS[self._refresh]} (rollout.max_proposal_gap is {self._max_gap:g}): "
                f"{reason}. Nothing was trained on its outputs"
            )
        return None

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
            ValueError: on every rank of the replica, when the engine gave no usable answer, or outputs of another law.
        """
        n = options.outputs
        places = list(range(len(prompts)))
        wanted = [list(range(n)) for _ in prompts]
        found: dict[int, SampledGroup] = {}
        with self._scorer(strategy, options.temperature) as score:
            for attempt in range(_ATTEMPTS):
                numbers = [[attempt * n + i for i in outputs] for outputs in wanted]
                share = [prompts[place] for place in places]
                wrong: dict[int, list[int]] = {}
                draws = Draws(share, options, seed, iteration, numbers, on_outputs, stop, again=attempt > 0)
                for block in self._drawn(strategy, draws):
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
            f"{self._section}: {self._who}: prompt {prompts[places[0]].id!r}: {_ATTEMPTS} outputs in "
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
        keep = self._on_mismatch == "keep"
        what = "are kept with the server's log q'" if keep else "are asked for again"
        warnings.warn(f"{self._section}: {len(bad)} outputs of another law than the model's {what}", stacklevel=2)
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

    def _blocks(self, answers: Iterable[tuple[int, SampledGroup] | None]) -> Iterator[list[tuple[int, SampledGroup]]]:
        """What the engine has finished, enough for a scoring pass at a time; nothing where they are waited for."""
        block: list[tuple[int, SampledGroup]] = []
        positions = 0
        for answer in answers:
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
