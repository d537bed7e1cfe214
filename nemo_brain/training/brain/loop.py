"""Algorithm 1: iterations of sampling, rewarding, scoring and several optimizer steps, with validation between them."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nemo_brain.config.brain import Config
from nemo_brain.core.groups import Prompt, RewardedGroup, Rollout, SampledGroup, ScoredGroup, output_matrix
from nemo_brain.core.ranks import on_all_ranks
from nemo_brain.data.order import prompts_of_iteration, shuffled, visits
from nemo_brain.data.rollouts import write_rollout
from nemo_brain.data.stop import Stop
from nemo_brain.durability.guards import nonfinite_rewards, warn_of_collapse, write_groups
from nemo_brain.objectives import Objective, target_divergences
from nemo_brain.report.evaluate import evaluate, rollout_metrics, staleness_metrics
from nemo_brain.report.progress import progress
from nemo_brain.report.run_dir import writing
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.data import BRAInData
from nemo_brain.training.brain.passes import Scores, StepResult
from nemo_brain.training.brain.rollout import VALIDATION, RolloutWorker
from nemo_brain.training.brain.scoring import ProposalGap
from nemo_brain.training.brain.state import BRAInState
from nemo_brain.training.brain.strategy import TrainStep
from nemo_brain.training.frame import Frame, Steps

_TRAIN_SAMPLES = 8  # groups per iteration that samples.jsonl keeps


class BRAInLoop:
    """A BRAIn run's iterations.

    Args:
        config: the run's configuration.
        frame: of the training.
        worker: makes the groups.
        objective: of the model in training.
        data: what it is made on.
        stop: what ends an output.
    """

    def __init__(
        self,
        config: Config,
        frame: Frame[BRAInState],
        worker: RolloutWorker,
        objective: Objective,
        data: BRAInData,
        stop: Stop,
    ):
        self.config = config
        self.frame = frame
        self.worker = worker
        self.objective = objective
        self.prompts, self.held_out = data.prompts, data.held_out
        # Log-probs of other kernels are not comparable with the policy's.
        self.offline: list[SampledGroup] = [dataclasses.replace(group, prior_logprobs=None) for group in data.offline]
        rollout = config.rollout
        self._from_prior = rollout.refresh == "never"
        self._ahead = rollout.ahead
        self._sampling = SamplingOptions(
            outputs=rollout.outputs_per_prompt,
            max_new_tokens=rollout.max_new_tokens,
            stop=stop,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            rows_in_flight=rollout.rows_in_flight,
            prefill_tokens=config.train.micro_batch_tokens,
        )
        # Validation asks for the policy's own law, whatever the proposal's temperature.
        self._validation = dataclasses.replace(
            self._sampling, outputs=config.validation.outputs_per_prompt, temperature=1.0, top_k=0, top_p=1.0
        )

    def steps(self) -> Steps:
        """Algorithm 1."""
        state, total = self.frame.state, self.config.trainer.max_iterations
        self.worker.setup()
        try:
            yield from self._iterations(state, total)
        finally:
            self.worker.close()

    def _iterations(self, state: BRAInState, total: int) -> Steps:
        if self.held_out and not state.start:
            self._validate(0)
        elif self._validation_due():  # a run that was stopped in one
            self._validate(state.step // self.config.steps_per_iteration)
        for iteration in range(state.step // self.config.steps_per_iteration, total):
            with self.frame.saved_if_interrupted():
                if not state.rollout:
                    state.rollout = self._make_rollout(iteration)
                elif self._ahead:  # a run that was stopped in its steps
                    self.worker.refresh(state.step, self._sampling, self._prompts(iteration), iteration)
                    self._begin(iteration)
            with progress(self.config.steps_per_iteration, f"iteration {iteration}: training", "steps") as bar:
                bar.update(state.step % self.config.steps_per_iteration)
                for batch, last in self._batches(iteration, state.rollout):
                    outcome = yield from self.frame.step(batch, {"iteration": iteration}, _step_metrics)
                    state.record["train_seconds"] += outcome.seconds
                    bar.update(1)
                    if not last:
                        self.frame.save_point()
            drifted = self._end_iteration(iteration)
            done = iteration + 1 == total
            if done:
                self.frame.interruption.ignore()  # what is left is short, and nothing to go on with
            if self._validation_due():
                self._validate(iteration + 1)
            self.frame.save_point(last=drifted or done, always=drifted)
            if drifted:
                return

    # One iteration.

    def _make_rollout(self, iteration: int) -> list[ScoredGroup]:
        """The iteration's scored groups; begins its record."""
        record: dict[str, float] = {}
        untrained = self.frame.state.step == 0
        with _timed(record, "sample_seconds"):
            if self.offline:
                rewarded, temperature = self._offline_groups(iteration), None
            else:
                prompts = self._prompts(iteration)
                # q' <- q
                own = self.config.rollout.refresh == "kl_adaptive"
                steps = self.frame.state.refreshed * self.config.steps_per_iteration if own else self.frame.state.step
                record |= self.worker.refresh(steps, self._sampling, prompts, iteration)
                with _timed(record, "ahead/wait_seconds") if self._ahead else contextlib.nullcontext():
                    sampled = self.worker.sample(prompts, self._sampling, iteration, f"iteration {iteration}: sampling")
                self._begin(iteration)
                rewarded = self.worker.reward(sampled)
                temperature = self._sampling.temperature if self.config.rollout.rescore_proposal else None
        with _timed(record, "score_seconds"):
            try:
                scored, gap = self.worker.scorer.score(rewarded, temperature, untrained)
            except ProposalGap as error:
                raise ValueError(f"{error}{self.worker.keep(iteration, rewarded)}") from error
        if self.offline:
            self._remember(iteration, scored)
        self.frame.state.record = {**record, **self._record(iteration, scored, gap), "train_seconds": 0.0}
        if self.config.rollout.refresh == "kl_adaptive" and iteration % self.config.rollout.refresh_every == 0:
            self._refresh_proposal(iteration, scored)
        return scored

    def _begin(self, iteration: int) -> None:
        """Has the server sample for the iterations after this one, as far as ``rollout.ahead`` says."""
        for later in range(iteration + 1, min(iteration + 1 + self._ahead, self.config.trainer.max_iterations)):
            if later not in self.worker.begun:
                self.worker.begin(self._prompts(later), self._sampling, later)

    def _refresh_proposal(self, iteration: int, groups: Sequence[ScoredGroup]) -> None:
        """q' <- q for the outputs to come, where by these the policy is nearer to the target than the proposal is."""
        scores = Scores.of(groups, keep_truncated=self.config.rollout.truncated == "keep")
        policy_GN = output_matrix(groups, "policy_logprobs")
        out = self.objective(policy_GN, **vars(scores))
        proposal, policy = target_divergences(out.alpha_GN, policy_GN - scores.proposal_logprobs_GN, scores.mask_GN)
        self.frame.state.record |= {"kl_target_proposal": proposal, "kl_target_policy": policy}
        if policy < proposal:
            self.worker.strategy.refresh_proposal()
            self.frame.state.refreshed = iteration

    def _batches(self, iteration: int, groups: Sequence[ScoredGroup]) -> Iterator[tuple[TrainStep, bool]]:
        """The batches of the iteration's steps that are still to be made, and whether each is its last."""
        count, size, seed = len(groups), self.config.train.global_batch_size, self.config.seed
        scores = Scores.of(groups, keep_truncated=self.config.rollout.truncated == "keep")
        policy_GN = output_matrix(groups, "policy_logprobs")
        steps = self.config.steps_per_iteration
        for step in range(self.frame.state.step % steps, steps):
            epoch, start = divmod(step * size, count)
            members = shuffled(count, f"{seed}/{iteration}/{epoch}")[start : start + size]
            # The first step after a refresh: the scoring pass has just computed log q.
            rescored = self.config.rollout.rescore_proposal or self._ahead > 0
            fresh = step == 0 and rescored and not self.offline
            batch = TrainStep(
                [groups[g] for g in members], Scores(**scores.rows(members)), policy_GN[members] if fresh else None
            )
            yield batch, step + 1 == steps

    def _end_iteration(self, iteration: int) -> bool:
        """Records the iteration. Returns whether its outputs were further from the prior than the run may go."""
        state, limit = self.frame.state, self.config.train.max_kl
        self.frame.write("iteration", {"iteration": iteration, **state.record, "peak_memory_gib": _peak_memory()})
        name = "kl_from_prior" if self._from_prior else "kl_to_prior"
        kl = state.record[name]
        state.rollout, state.record = [], {}
        if limit is None or kl <= limit:
            return False
        warnings.warn(f"{name} is {kl:.3g} nats, above train.max_kl={limit:g}: the run stops here", stacklevel=2)
        return True

    def _prompts(self, iteration: int) -> list[Prompt]:
        count, seed = self.config.rollout.prompts_per_iteration, self.config.seed
        return on_all_ranks(lambda: prompts_of_iteration(self.prompts, iteration, count, seed))

    def _record(self, iteration: int, groups: Sequence[ScoredGroup], gap: float | None) -> dict[str, Any]:
        """The record of the iteration's groups; writes what of them is kept in files."""
        rollout, frame = self.config.rollout, self.frame
        scores = Scores.of(groups, keep_truncated=rollout.truncated == "keep")
        out = self.objective(output_matrix(groups, "policy_logprobs"), **vars(scores))
        frame.write_samples(iteration, groups[:_TRAIN_SAMPLES], "train", out.alpha_GN)
        if frame.writer:
            warn_of_collapse(out.ess_alpha_G.mean().item(), self.config.train.min_ess, rollout.outputs_per_prompt)
            with writing(frame.run_dir):
                self._report_nonfinite_rewards(iteration, groups)
                if rollout.save:
                    write_rollout(frame.run_dir / "rollouts.jsonl", Rollout(iteration, groups))
        metrics = rollout_metrics(groups, rollout.outputs_per_prompt, gap, self._from_prior)
        if self._ahead:
            metrics |= staleness_metrics(groups, frame.state.step)
        return {**metrics, "groups/zero_gradient": int(out.zero_gradient_G.sum())}

    def _report_nonfinite_rewards(self, iteration: int, groups: Sequence[ScoredGroup]) -> None:
        """Warns where outputs are left out, as train.on_nonfinite=skip has it, and writes their groups."""
        if bad := nonfinite_rewards(groups):
            path = self.frame.run_dir / f"nonfinite_rewards_{iteration}.jsonl"
            write_groups(path, bad)
            what = f"outputs of {len(bad)} groups have no finite reward and are left out"
            warnings.warn(f"iteration {iteration}: {what}; their groups are in {path}", stacklevel=2)

    # Groups sampled elsewhere.

    def _visits(self, iteration: int) -> list[int]:
        count = self.config.rollout.prompts_per_iteration
        return [index for index, _ in visits(len(self.offline), iteration, count, self.config.seed)]

    def _offline_groups(self, iteration: int) -> list[RewardedGroup]:
        """The iteration's offline groups, rewarded where they came without a reward."""
        order = self._visits(iteration)
        missing = [index for index in dict.fromkeys(order) if not isinstance(self.offline[index], RewardedGroup)]
        if missing:
            found = self.worker.reward_offline([self.offline[index] for index in missing])
            for index, rewarded in zip(missing, found, strict=True):
                self.offline[index] = rewarded
        return [group for index in order if isinstance(group := self.offline[index], RewardedGroup)]

    def _remember(self, iteration: int, scored: Sequence[ScoredGroup]) -> None:
        """What the prior gives the groups, for when they come again."""
        for index, group in zip(self._visits(iteration), scored, strict=True):
            self.offline[index] = dataclasses.replace(self.offline[index], prior_logprobs=group.prior_logprobs)

    # Validation.

    def _validation_due(self) -> bool:
        """Whether the iteration that has just ended is one to validate after, and that is still to be done."""
        iterations, within = divmod(self.frame.state.step, self.config.steps_per_iteration)
        every = iterations % self.config.trainer.val_every_iterations == 0
        last = iterations == self.config.trainer.max_iterations
        return bool(self.held_out) and not within and iterations > self.frame.state.validated and (every or last)

    def _validate(self, iteration: int) -> None:
        """Samples for the held-out prompts, compares with the start model, and records it.

        Every validation uses the same draws, so start and current model differ by their weights only.
        """
        state = self.frame.state
        with self.frame.saved_if_interrupted():
            prompts = on_all_ranks(lambda: list(self.held_out))
            self.worker.refresh(state.step, self._validation, prompts, VALIDATION)
            rewarded = self.worker.reward(
                self.worker.sample(prompts, self._validation, VALIDATION, "validation: sampling")
            )
            groups, _ = self.worker.scorer.score(rewarded, 1.0, untrained=state.step == 0, validation=True)
            if iteration == 0:
                state.reference_rewards = self.worker.reference_rewards(prompts)
                state.start = groups
        result = evaluate(state.start, groups, state.reference_rewards)
        state.score, state.validated = result.reward.mean, iteration
        self.frame.write("eval", {"iteration": iteration, **result.as_metrics()})
        last = iteration == self.config.trainer.max_iterations
        self.frame.write_samples(iteration, groups, "start" if iteration == 0 else "final" if last else "validation")


def _step_metrics(result: StepResult) -> dict[str, Any]:
    out = result.objective
    return {
        "loss": out.loss_G.mean(),
        "kl_alpha_beta": out.kl_G.mean(),
        "ess_alpha": out.ess_alpha_G.mean(),
        "ess_beta": out.ess_beta_G.mean(),
        "max_alpha": out.max_alpha_G.mean(),
    }


@contextlib.contextmanager
def _timed(record: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    record[name] = time.perf_counter() - started


def _peak_memory() -> float:
    """GiB: the device's peak with CUDA, otherwise the process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
