"""Makes groups: sampled, rewarded and scored by all ranks together. Every rank ends up with all of them.

Shapes: G groups, N outputs per group, E temperatures.

Each data-parallel replica samples for its share of the prompts. Groups are rewarded as they are finished, on a thread
of the replica's first rank, while the others are still being sampled; by a ``CollectiveReward`` afterwards, on all of
the replica's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_brain.config.brain import Config
from nemo_brain.core.groups import Group, Output, Prompt, Rollout
from nemo_brain.core.interruption import Interrupted, Interruption
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.data.rollouts import write_rollout
from nemo_brain.data.tokenizers import encode
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
from nemo_brain.training.brain.remote_rollout import RemoteRollout
from nemo_brain.training.brain.strategy import BRAInStrategy

# Outputs that a reward is called with at least, but for the last: the number is fixed so that what a call holds, and
# with it the rounding of a reward that is a model, does not depend on timing.
_REWARD_BATCH = 64


class RolloutWorker:
    """This rank's part in making groups. All ranks call its methods in the same order with the same arguments.

    ``remote`` samples in place of the policy's own ranks, if it is given; ``interruption`` may end sampling early.
    """

    def __init__(
        self,
        config: Config,
        strategy: BRAInStrategy,
        reward: Reward | CollectiveReward,
        remote: RemoteRollout | None,
        interruption: Interruption,
    ):
        self.config = config
        self.strategy = strategy
        self.reward = reward
        self.remote = remote
        self.interruption = interruption
        self._members = parallel_state.get_model_parallel_group()
        self._replicas = parallel_state.get_data_parallel_group()
        self._first = self._members.rank() == 0
        self._skip_nonfinite = config.train.on_nonfinite == "skip"
        self._once_per_replica(lambda: load_reward(reward))
        self._collective = getattr(reward, "collective", False)
        if self._collective:
            reward.setup(strategy)

    def sample(
        self, prompts: Sequence[Prompt], options: SamplingOptions, iteration: int, step: int, description: str
    ) -> list[Group]:
        """A group with rewards for each prompt, in their order, from the policy after ``step`` optimizer steps.

        Raises:
            ValueError: the reward or the inference server failed; on every rank. The groups sampled so far are in the
                run directory's failed_rollout.jsonl.
            Interrupted: the run was asked to end; on every rank.
        """
        if self.remote is not None:
            self.remote.refresh(self.strategy, step, options)
        rank, ranks = self._replicas.rank(), self._replicas.size()
        share = list(prompts[rank::ranks])
        groups: dict[int, Group] = {}
        failure: ValueError | None = None
        with (
            progress(len(share) * options.outputs, description, "outputs") as bar,
            _RewardThread(self._reward if self._first and not self._collective else None) as rewards,
        ):
            try:
                for index, group in self._sampled(share, options, iteration, bar.update):
                    groups[index] = group
                    rewards.add(group)
            except ValueError as error:
                failure = error  # on all ranks of this replica: those of the others are told below

            if any(self._gather(failure is None and len(groups) < len(share))):
                raise Interrupted(self.interruption.reason)

            def finish() -> None:
                if failure is not None:
                    raise failure
                rewards.wait()

            ordered = [groups[index] for index in sorted(groups)]
            if self._collective and failure is None:
                try:
                    score_groups_in_step(self.reward, ordered, True, self._skip_nonfinite)
                except ValueError as error:
                    failure = error
            try:
                self._share_rewards(ordered, finish)
            except ValueError as error:
                rewards.close()  # so that it changes nothing that is being written
                raise ValueError(f"{error}{self._keep(iteration, ordered)}") from error
        shares = self._gather(ordered)
        return [shares[i % ranks][i // ranks] for i in range(len(prompts))]

    def _sampled(self, share, options: SamplingOptions, iteration: int, on_outputs) -> Iterator[tuple[int, Group]]:
        arguments = (share, options, self.config.seed, iteration, on_outputs, self._stop)
        if self.remote is None:
            return self.strategy.sample(*arguments)
        return self.remote.sample(self.strategy, *arguments)

    def _stop(self) -> bool:
        return self.interruption.agreed(group=self._members)[0]

    def _keep(self, iteration: int, groups: list[Group]) -> str:
        """Writes what all ranks have sampled before the run ends, each its ``groups``; says where, to add to the error.

        Called by every rank, all of which have the same error by now. Some groups may lack rewards.
        """
        shares = self._gather(groups)
        note = [""]
        if dist.get_rank() == 0:
            path = Path(self.config.run_dir) / "failed_rollout.jsonl"
            kept = [group for share in shares for group in share]
            try:
                write_rollout(path, Rollout(iteration, kept))
                note = [f" (the {len(kept)} groups sampled in this iteration are in {path})"]
            except OSError as error:
                note = [f" (the groups sampled in this iteration could not be written to {path}: {error})"]
        # The others must not end before it is written: torchrun would end this rank too.
        dist.broadcast_object_list(note, src=0)
        return note[0]

    def score_rewards(self, groups: Sequence[Group]) -> None:
        """Sets the rewards of groups that every rank has; ValueError as in ``sample``."""
        if self._collective:
            score_groups_in_step(self.reward, groups, False, self._skip_nonfinite)
            return
        self._share_rewards(groups, lambda: self._reward(groups))

    def _reward(self, groups: Sequence[Group]) -> None:
        score_groups(self.reward, groups, self._skip_nonfinite)

    def reference_rewards(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """The rewards of the prompts' own reference answers: what a human's answers would earn."""
        known = [prompt for prompt in prompts if prompt.reference is not None]
        if self._collective:
            tokenizer = self.strategy.lightning_module.tokenizer
            answers = [[*encode(tokenizer, prompt.reference), tokenizer.eos_token_id] for prompt in known]
            groups = [
                Group(prompt, [Output(ids, prompt.reference, ended=True)])
                for prompt, ids in zip(known, answers, strict=True)
            ]
            self.score_rewards(groups)
            found = {group.prompt.id: group.outputs[0].reward for group in groups}
            return [found.get(prompt.id) for prompt in prompts]

        def work() -> list[float | None]:
            values = compute_rewards(
                self.reward,
                [prompt.text for prompt in known],
                [prompt.reference for prompt in known],
                references=[prompt.reference for prompt in known],
                metadata=[prompt.metadata for prompt in known],
                skip_nonfinite=self._skip_nonfinite,
            )
            found = dict(zip((prompt.id for prompt in known), values, strict=True))
            return [found.get(prompt.id) for prompt in prompts]

        return self._once_per_replica(work)

    def score(self, groups: Sequence[Group], temperatures: tuple[float, ...], untrained: bool) -> torch.Tensor | None:
        """Sets log p of every output, and with ``temperatures`` log q of the policy as it stands.

        Args:
            temperatures: at which the policy is scored: none, or 1 and perhaps another.
            untrained: the policy still is the prior, so that one pass does for both.

        Returns:
            log q [E, G, N]; None without temperatures.
        """
        # The prior does not change: what it has scored once, a server's outputs or groups that come again, it has not
        # to score again.
        unknown = [group for group in groups if any(output.prior_logprob is None for output in group.outputs)]
        same = untrained and len(temperatures) > 0
        positions = sum(self._positions(group) for group in groups) if temperatures else 0
        positions += 0 if same else sum(self._positions(group) for group in unknown)
        policy_EGN = None
        with progress(positions // self._replicas.size(), "scoring", "tokens") as bar:
            if temperatures:
                policy_EGN = self.strategy.policy_logprobs(groups, temperatures, bar.update)
                _fill(groups, "policy_logprob", policy_EGN[0])
            if same:
                _fill(groups, "prior_logprob", policy_EGN[0])
            elif unknown:
                with self.strategy.prior() as logprobs:
                    _fill(unknown, "prior_logprob", logprobs(unknown, bar.update))
        return policy_EGN

    def _positions(self, group: Group) -> int:
        return chunk_tokens(group, range(len(group.outputs)), self.config.layout)

    def _share_rewards(self, groups: Sequence[Group], work: Callable[[], None]) -> None:
        """``work`` sets the groups' rewards on the replica's first rank; the other ranks set the same."""

        def rewards() -> list[list[float]]:
            work()
            return [[output.reward for output in group.outputs] for group in groups]

        for group, values in zip(groups, self._once_per_replica(rewards), strict=True):
            for output, value in zip(group.outputs, values, strict=True):
                output.reward = value

    def _once_per_replica(self, work: Callable[[], object]):
        """The result of ``work`` on the first rank of the model-parallel group, on all of them.

        An error there becomes an error on every rank of the run, so that none waits for the others in a collective.
        """
        answer: list[object] = [None, None]
        if self._first:
            try:
                answer[0] = work()
            except ValueError as error:
                answer[1] = error
        if self._members.size() > 1:
            dist.broadcast_object_list(answer, dist.get_process_group_ranks(self._members)[0], group=self._members)
        for error in self._gather(answer[1]):
            if error is not None:
                raise error
        return answer[0]

    def _gather(self, value) -> list:
        """Every data-parallel replica's value, in their order."""
        if self._replicas.size() == 1:
            return [value]
        values = [None] * self._replicas.size()
        dist.all_gather_object(values, value, group=self._replicas)
        return values


def _fill(groups: Sequence[Group], name: str, values_GN: torch.Tensor) -> None:
    """Sets one field of every output."""
    for group, values in zip(groups, values_GN.tolist(), strict=True):
        for output, value in zip(group.outputs, values, strict=False):  # a group may have fewer outputs than others
            setattr(output, name, value)


class _RewardThread:
    """Rewards groups in the background, in the order in which they are added; ``score`` sets the rewards of some, or is
    None where there is nothing to do."""

    def __init__(self, score: Callable[[Sequence[Group]], None] | None):
        self._score = score
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._waiting: list[Group] = []
        self._running: list[Future] = []
        self._failed = False

    def __enter__(self) -> _RewardThread:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def add(self, group: Group) -> None:
        self._waiting.append(group)
        if sum(len(waiting.outputs) for waiting in self._waiting) >= _REWARD_BATCH:
            self._submit()

    def wait(self) -> None:
        """Until all groups have their rewards. ValueError: the first that the reward raised."""
        self._submit()
        for future in self._running:
            future.result()

    def _submit(self) -> None:
        if self._score is not None and self._waiting:
            self._running.append(self._executor.submit(self._work, self._waiting))
        self._waiting = []

    def _work(self, groups: list[Group]) -> None:
        if self._failed:
            return  # the run is about to end: a server that is down must not be waited for again
        try:
            self._score(groups)
        except ValueError:
            self._failed = True
            raise
