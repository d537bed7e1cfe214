"""Makes groups: sampled and rewarded by all ranks together, then scored (``scoring``). Every rank ends up with all.

Each data-parallel replica samples for its share of the prompts. Groups are rewarded as they are finished, on a thread
of the replica's first rank, while the others are still being sampled; by a ``CollectiveReward`` afterwards, on all of
the replica's ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_brain.core.groups import (
    Group,
    Output,
    Prompt,
    RewardedGroup,
    Rollout,
    SampledGroup,
    rewarded,
)
from nemo_brain.core.interruption import Interrupted, Interruption
from nemo_brain.core.ranks import gathered, in_thread, on_all_ranks, on_first_rank
from nemo_brain.data.rollouts import write_rollout
from nemo_brain.data.stop import Stop
from nemo_brain.report.progress import progress
from nemo_brain.rewards.protocol import (
    CollectiveReward,
    Reward,
    compute_rewards,
    load_reward,
    score_groups,
    score_groups_in_step,
)
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.engine import EngineRollout
from nemo_brain.training.brain.rewarding import RewardThread
from nemo_brain.training.brain.scoring import Scorer
from nemo_brain.training.brain.strategy import BRAInStrategy

_POLL_SECONDS = 0.5
VALIDATION = -1  # the "iteration" of validation draws: the same at every validation, so that its noise is shared


@dataclass
class Sampling:
    """What a replica has sampled of its share of the prompts, by their places in it; rewards may be on their way.

    failure: what ended it, on all ranks of the replica.
    """

    iteration: int
    prompts: int
    share: int
    groups: dict[int, SampledGroup]
    rewards: RewardThread | None
    failure: ValueError | None = None

    def take(self, groups: Iterator[tuple[int, SampledGroup]]) -> dict[int, SampledGroup]:
        """Adds groups as they come, and has them rewarded; returns all."""
        for place, group in groups:
            self.groups[place] = group
            if self.rewards is not None:
                self.rewards.add(group)
        return self.groups

    @property
    def interrupted(self) -> bool:
        return self.failure is None and len(self.groups) < self.share

    @property
    def ordered(self) -> list[SampledGroup]:
        return [self.groups[place] for place in sorted(self.groups)]

    @property
    def kept(self) -> list[SampledGroup]:
        """What there is when the iteration fails, with the rewards that there are."""
        done = {group.prompt.id: group for group in (self.rewards.done if self.rewards else ())}
        return [done.get(group.prompt.id, group) for group in self.ordered]


class RolloutWorker:
    """This rank's part in making groups. All ranks call its methods in the same order with the same arguments.

    Args:
        strategy: samples and scores.
        reward: of the outputs.
        remote: an engine that samples in place of the policy's own ranks, if it is given.
        interruption: may end sampling and waiting early.
        stop: what ends an output.
        seed: of the draws.
        run_dir: where the groups of an iteration go that fails.
        skip_nonfinite: rewards that are not finite are taken.
        max_gap: nats per token by which the sampler's log q' may differ from the training kernels', on average.
        refresh: what the proposal is, see ``rollout.refresh``.
    """

    def __init__(
        self,
        strategy: BRAInStrategy,
        reward: Reward | CollectiveReward,
        remote: EngineRollout | None,
        interruption: Interruption,
        stop: Stop,
        *,
        seed: int,
        run_dir: Path,
        skip_nonfinite: bool,
        max_gap: float = math.inf,
        refresh: str = "always",
    ):
        self.strategy = strategy
        self.reward_model: Any = reward  # which of the two it is, says ``collective``
        self.remote = remote
        self.interruption = interruption
        self._ends = stop
        self._seed = seed
        self._run_dir = run_dir
        self._skip_nonfinite = skip_nonfinite
        self._refresh = refresh
        self.scorer = Scorer(strategy, max_gap, refresh)
        self._begun: dict[int, tuple[Sampling, Future | None]] = {}
        self._collective = getattr(reward, "collective", False)

    def setup(self) -> None:
        """Has the reward load what it needs. Once, when the model has been set up.

        Raises:
            ValueError: it cannot; on every rank.
        """
        on_first_rank(lambda: load_reward(self.reward_model), self._members)
        if self._collective:
            self.reward_model.setup(self.strategy)

    @property
    def _members(self) -> dist.ProcessGroup:
        """The ranks of this model replica."""
        return parallel_state.get_model_parallel_group()

    @property
    def _replicas(self) -> dist.ProcessGroup:
        """This rank's counterparts in all replicas."""
        return parallel_state.get_data_parallel_group()

    @property
    def _first(self) -> bool:
        return self._members.rank() == 0

    def refresh(
        self, step: int, options: SamplingOptions, prompts: Sequence[Prompt], iteration: int
    ) -> dict[str, float]:
        """q' <- q: from now on the policy as it stands is sampled from; or the proposal's own weights.

        Args:
            step: optimizer steps behind it.

        Returns:
            What that took, where it takes anything.

        Raises:
            ValueError, OSError: the inference server did not take it, or samples from another law; on every rank.
            Interrupted: the run was asked to end; on every rank.
        """
        if not self._by_server(iteration):
            return {}
        assert self.remote is not None
        started = time.perf_counter()
        moved = self.remote.refresh(self.strategy, step, options, prompts, self.interruption)
        return {"refresh_seconds": time.perf_counter() - started, **moved}

    def sample(self, prompts: Sequence[Prompt], options: SamplingOptions, iteration: int, description: str) -> Sampling:
        """Samples a group for each prompt of this replica's share, and begins to reward them.

        Args:
            iteration: of the draws; that of a validation asks the policy, the others the proposal.
        """
        if iteration in self._begun:
            return self._ahead(iteration, description)
        share, sampling = self._share(prompts, iteration)
        with progress(len(share) * options.outputs, description, "outputs") as bar:
            try:
                sampling.take(self._sampled(share, options, iteration, bar.update))
            except ValueError as error:
                sampling.failure = error  # the other replicas are told when they reward theirs
        return sampling

    def begin(self, prompts: Sequence[Prompt], options: SamplingOptions, iteration: int) -> None:
        """Has the server sample for an iteration to come, and begins to reward what it has done, while the ranks go on.
        ``sample`` of that iteration then waits for what is left. Once for each iteration.
        """
        share, sampling = self._share(prompts, iteration)
        taking = None
        if self._first:
            assert self.remote is not None
            groups = self.remote.begin(share, options, self._seed, iteration)
            taking = in_thread(lambda: sampling.take(groups), "rollout.ahead")
        self._begun[iteration] = sampling, taking

    @property
    def begun(self) -> Container[int]:
        """The iterations that ``begin`` has begun, and ``sample`` not asked for."""
        return self._begun

    def close(self) -> None:
        """Ends what is under way."""
        if self.remote is not None:
            self.remote.close()

    def _share(self, prompts: Sequence[Prompt], iteration: int) -> tuple[list[Prompt], Sampling]:
        """This replica's prompts, and what is to be sampled for them."""
        rank, ranks = self._replicas.rank(), self._replicas.size()
        share = list(prompts[rank::ranks])
        rewards = RewardThread(self._reward_groups) if self._first and not self._collective else None
        return share, Sampling(iteration, len(prompts), len(share), {}, rewards)

    def _ahead(self, iteration: int, description: str) -> Sampling:
        """What ``begin`` has begun, once it is done on all replicas or the run was asked to end."""
        assert self.remote is not None
        sampling, taking = self._begun.pop(iteration)
        waiting, shown = True, 0
        with progress(sampling.share, description, "prompts") as bar:
            while waiting:
                left = taking is not None and not wait([taking], _POLL_SECONDS).done
                interrupted, waiting, lacking = self.interruption.agreed(left, self.remote.lacking)
                if interrupted:
                    sampling.groups = {}
                    return sampling
                if lacking:
                    self.remote.mend(self.strategy)
                bar.update(len(sampling.groups) - shown)
                shown = len(sampling.groups)
        try:
            sampling.groups = on_first_rank(lambda: taking.result() if taking else {}, self._members)
        except ValueError as error:
            sampling.failure = error
        return sampling

    def reward(self, sampling: Sampling) -> list[RewardedGroup]:
        """A group with rewards for each prompt, in the order of the prompts.

        Raises:
            ValueError: sampling or the reward failed; on every rank. The groups sampled so far are in the run
                directory's failed_rollout.jsonl.
            Interrupted: the run was asked to end; on every rank.
        """
        if any(gathered(sampling.interrupted)):
            raise Interrupted(self.interruption.reason)
        try:
            share = self._rewarded(sampling)
        except ValueError as error:
            kept = [share for share in gathered(sampling.kept if self._first else None) if share is not None]
            groups = [group for share in kept for group in share]
            raise ValueError(f"{error}{self.keep(sampling.iteration, groups)}") from error
        shares = gathered(share, self._replicas)
        return [shares[i % len(shares)][i // len(shares)] for i in range(sampling.prompts)]

    def reward_offline(self, groups: Sequence[SampledGroup]) -> list[RewardedGroup]:
        """Groups that every rank has, with rewards. Raises as ``reward``, but keeps nothing."""
        if self._collective:
            return on_all_ranks(lambda: self._score_in_step(groups, alone=False))
        return self._with_rewards(groups, lambda: self._reward_groups(groups))

    def reference_rewards(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """The rewards of the prompts' own reference answers: what a human's answers would earn."""
        known = [prompt for prompt in prompts if prompt.reference is not None]
        if self._collective:
            tokenizer = self.strategy.lightning_module.tokenizer
            answers = [self._ends.given(tokenizer, prompt.reference or "") for prompt in known]
            groups = [
                SampledGroup(prompt, [Output(ids, prompt.reference or "", ended=True)])
                for prompt, ids in zip(known, answers, strict=True)
            ]
            values = [group.rewards[0] for group in self.reward_offline(groups)]
        else:
            values = on_first_rank(lambda: self._reference_rewards(known), self._members, self.interruption)
        found = dict(zip((prompt.id for prompt in known), values, strict=True))
        return [found.get(prompt.id) for prompt in prompts]

    def _sampled(
        self, share: Any, options: SamplingOptions, iteration: int, on_outputs: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]:
        arguments = (share, options, self._seed, iteration, on_outputs, self._stop)
        proposal = iteration != VALIDATION
        if self._by_server(iteration):
            assert self.remote is not None
            return self.remote.sample(self.strategy, *arguments)
        if proposal and self._refresh != "always":
            return self.strategy.sample_frozen(*arguments)
        return self.strategy.sample(*arguments)

    def _by_server(self, iteration: int) -> bool:
        """Whether the engine samples. Validations ask the policy, and not a server that has other weights."""
        return self.remote is not None and (iteration != VALIDATION or self.remote.follows)

    def _stop(self) -> bool:
        return self.interruption.agreed(group=self._members)[0]

    def _rewarded(self, sampling: Sampling) -> list[RewardedGroup]:
        """The replica's share with its rewards; ValueError on every rank of the run."""

        def failing() -> None:
            if sampling.failure is not None:
                raise sampling.failure

        if self._collective:
            on_all_ranks(failing)
            return on_all_ranks(lambda: self._score_in_step(sampling.ordered, alone=True))

        def finish() -> list[RewardedGroup]:
            failing()
            assert sampling.rewards is not None
            places = dict(zip(sampling.groups, sampling.rewards.finish(), strict=True))
            return [places[place] for place in sorted(places)]

        return self._with_rewards(sampling.ordered, finish)

    def _with_rewards(self, groups: Sequence[SampledGroup], work: Any) -> list[RewardedGroup]:
        """The groups with the rewards that ``work`` finds on the first rank of the replica."""
        rewards = on_first_rank(lambda: [group.rewards for group in work()], self._members, self.interruption)
        return [rewarded(group, values) for group, values in zip(groups, rewards, strict=True)]

    def _score_in_step(self, groups: Sequence[SampledGroup], alone: bool) -> list[RewardedGroup]:
        return score_groups_in_step(self.reward_model, groups, alone, self._skip_nonfinite)

    def _reward_groups(self, groups: Sequence[SampledGroup]) -> list[RewardedGroup]:
        return score_groups(self.reward_model, groups, self._skip_nonfinite)

    def _reference_rewards(self, prompts: Sequence[Prompt]) -> list[float]:
        return compute_rewards(
            self.reward_model,
            [prompt.text for prompt in prompts],
            [prompt.reference or "" for prompt in prompts],
            references=[prompt.reference for prompt in prompts],
            metadata=[prompt.metadata for prompt in prompts],
            skip_nonfinite=self._skip_nonfinite,
        )

    def keep(self, iteration: int, groups: Sequence[Group]) -> str:
        """Writes what all ranks have sampled before the run ends; says where, to add to the error.

        Called by every rank, all of which have the groups and the same error by now.
        """
        path = self._run_dir / "failed_rollout.jsonl"

        def write() -> str:
            try:
                write_rollout(path, Rollout(iteration, groups))
                return f" (the {len(groups)} groups sampled in this iteration are in {path})"
            except OSError as error:
                return f" (the groups sampled in this iteration could not be written to {path}: {error})"

        # The others must not end before it is written: torchrun would end this rank too.
        return on_first_rank(write)
