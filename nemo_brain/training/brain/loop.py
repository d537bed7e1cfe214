"""Algorithm 1: iterations of sampling, scoring and several optimizer steps, with validation between them.

``BRAInLoop`` is the training data of the Lightning trainer: iterating over it samples and scores when the next step
needs new groups. It is also a callback, which records each step once the optimizer is done. Every rank holds the whole
rollout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from nemo_brain.config.brain import Config
from nemo_brain.core.groups import Group, Prompt, Rollout, output_matrix
from nemo_brain.core.interruption import Interrupted, Interruption
from nemo_brain.data.order import prompts_of_iteration, shuffled, visits
from nemo_brain.data.rollouts import write_rollout
from nemo_brain.durability.checkpoint import groups_from_json, read_json
from nemo_brain.durability.guards import nonfinite_message, nonfinite_rewards, warn_of_collapse, write_groups
from nemo_brain.durability.saving import Checkpointer, gathered, restore_random_states
from nemo_brain.report.evaluate import evaluate, rollout_metrics
from nemo_brain.report.metrics import MetricsWriter, write_samples, writing
from nemo_brain.report.progress import progress
from nemo_brain.rewards.protocol import Reward
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.passes import Scores
from nemo_brain.training.brain.remote_rollout import RemoteRollout
from nemo_brain.training.brain.rollout import RolloutWorker
from nemo_brain.training.brain.strategy import TrainStep

_VALIDATION = -1  # the "iteration" of validation draws: the same at every validation, so that its noise is shared
_TRAIN_SAMPLES = 8  # groups per iteration that samples.jsonl keeps


class BRAInLoop(pl.Callback):
    """Yields the run's ``TrainStep``s in order.

    Args:
        config: the run's configuration.
        prompts: training prompts, or none if there are ``offline`` groups.
        offline: groups sampled elsewhere, trained on instead of sampling.
        held_out: validation prompts; none of them: no validation.
        reward: scores outputs.
        remote: samples in place of the policy's own ranks.
        run_dir: where rank 0 writes.
        checkpointer: writes the run's state when it is due.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        offline: Sequence[Group],
        held_out: Sequence[Prompt],
        reward: Reward,
        remote: RemoteRollout | None,
        run_dir: Path,
        checkpointer: Checkpointer,
    ):
        self.config = config
        self.prompts = prompts
        self.offline = offline
        for output in (output for group in offline for output in group.outputs):
            output.prior_logprob = None  # those of other kernels are not comparable with the policy's
        self.held_out = held_out
        self.reward = reward
        self.remote = remote
        self.run_dir = run_dir
        self.checkpointer = checkpointer
        self.interruption = Interruption(config.trainer.stop_after_minutes)
        self.step = 0
        rollout = config.rollout
        self._sampling = SamplingOptions(
            outputs=rollout.outputs_per_prompt,
            max_new_tokens=rollout.max_new_tokens,
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
        self._start_groups: list[Group] = []
        self._reference_rewards: list[float | None] | None = None
        self._record: dict[str, float] = {}
        self._rollout: list[Group] = []  # the scored groups of the iteration under way
        self._score_of_eval: float | None = None
        self._validated = 0  # iterations before the last validation
        self._skipped = 0  # steps left out because their gradient was not finite
        self._current: TrainStep | None = None

    # What the trainer calls.

    def on_fit_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.worker = RolloutWorker(self.config, trainer.strategy, self.reward, self.remote, self.interruption)
        self._trainer = trainer
        self.objective = model.objective
        self.writer = None
        if trainer.is_global_zero:
            self.writer = MetricsWriter(self.run_dir, trainer.loggers, self.config.trainer.log_every_steps)

    def on_train_start(self, trainer, model) -> None:
        self.interruption.listen()

    def __iter__(self) -> Iterator[TrainStep]:
        if (path := self._trainer.strategy.resumed_from) is not None:
            self._restore(path)
        if self.held_out and not self._start_groups:
            self._or_save(self._validate, 0)
        elif self._validation_due():
            self._or_save(self._validate, self.step // self.config.steps_per_iteration)
        for iteration in range(self.step // self.config.steps_per_iteration, self.config.trainer.max_iterations):
            yield from self._iteration(iteration)

    def on_before_optimizer_step(self, trainer, model, optimizer) -> None:
        # Read here: the scheduler has moved on by the end of the batch.
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        """Records the step that the optimizer has just made; after the iteration's last one, the iteration."""
        step, result = self._current, self._current.result
        seconds = time.perf_counter() - self._step_started
        self._record["train_seconds"] += seconds
        self.step += 1
        out = result.objective
        self._write(
            "step",
            {
                "iteration": step.iteration,
                "loss": out.loss_G.mean(),
                "kl_alpha_beta": out.kl_G.mean(),
                "ess_alpha": out.ess_alpha_G.mean(),
                "ess_beta": out.ess_beta_G.mean(),
                "max_alpha": out.max_alpha_G.mean(),
                "grad_norm": trainer.callback_metrics.get("grad_norm"),
                "lr": self._lr,
                "tokens": result.tokens,
                "step_seconds": seconds,
                "tokens_per_second": result.tokens / seconds,
            },
        )
        self._bar.update(1)
        self._check_gradient(step)
        done = self.step == self.config.trainer.max_iterations * self.config.steps_per_iteration
        if self.step % self.config.steps_per_iteration == 0:
            self._bars.close()
            self._rollout = []
            self._write("iteration", {"iteration": step.iteration, **self._record, "peak_memory_gib": _peak_memory()})
            if done:
                self.interruption.ignore()
            if self._validation_due():
                self._or_save(self._validate, step.iteration + 1, done)
        saving = self.checkpointer
        interrupted, due, failed = self.interruption.agreed(saving.due(self.step), saving.failed)
        drifted = self._drifted()
        if interrupted or drifted or (self.config.checkpoint.at_end if done else due):
            self._save()
        if interrupted or drifted or done or failed:
            saving.finish()
        if drifted:
            trainer.should_stop = True
        if interrupted:
            raise Interrupted(self.interruption.reason)

    def _check_gradient(self, step: TrainStep) -> None:
        """After a step that was left out because its gradient was not finite: writes its groups; ValueError to stop."""
        skipped = sum(guard.skipped for guard in self._trainer.strategy.guards)
        if skipped == self._skipped:
            return
        self._skipped = skipped
        if self.writer:
            with writing(self.run_dir):
                write_groups(self.run_dir / f"nonfinite_step_{self.step}.jsonl", step.groups)
        if self.config.train.on_nonfinite == "stop":
            raise ValueError(nonfinite_message(self.step))

    def _drifted(self) -> bool:
        """At the end of an iteration: whether its outputs were further from the prior than the run may go."""
        limit, kl = self.config.train.max_kl, self._record.get("kl_to_prior")
        ended = self.step % self.config.steps_per_iteration == 0
        if not ended or limit is None or kl is None or kl <= limit:
            return False
        warnings.warn(f"kl_to_prior is {kl:.3g} nats, above train.max_kl={limit:g}: the run stops here", stacklevel=2)
        return True

    # One iteration.

    def _iteration(self, iteration: int) -> Iterator[TrainStep]:
        if not self._rollout:
            self._record = {}
            self._rollout = self._or_save(self._offline_groups if self.offline else self._sample, iteration)
            self._score(iteration, self._rollout)
        groups = self._rollout
        scores = Scores.of(groups, keep_truncated=self.config.rollout.truncated == "keep")
        policy_GN = output_matrix(groups, "policy_logprob")
        done = self.step % self.config.steps_per_iteration  # of this iteration's steps, before the run was resumed
        with contextlib.ExitStack() as self._bars:
            total = self.config.steps_per_iteration
            self._bar = self._bars.enter_context(progress(total, f"iteration {iteration}: training", "steps"))
            self._bar.update(done)
            size = self.config.train.global_batch_size
            for epoch in range(self.config.train.epochs_per_iteration):
                order = shuffled(len(groups), f"{self.config.seed}/{iteration}/{epoch}")
                for start in range(0, len(groups), size):
                    if done:
                        done -= 1
                        continue
                    members = order[start : start + size]
                    # The first step after a refresh: the scoring pass has just computed log q.
                    fresh = epoch == 0 and start == 0 and self.config.rollout.rescore_proposal and not self.offline
                    self._current = TrainStep(
                        iteration,
                        [groups[g] for g in members],
                        Scores(**scores.rows(members)),
                        policy_GN[members] if fresh else None,
                    )
                    self._step_started = time.perf_counter()
                    yield self._current

    def _sample(self, iteration: int) -> list[Group]:
        """The iteration's groups with rewards, sampled by all data-parallel ranks, each its share of the prompts."""
        count, seed = self.config.rollout.prompts_per_iteration, self.config.seed
        prompts = _on_every_rank(lambda: prompts_of_iteration(self.prompts, iteration, count, seed))
        with self._timed("sample_seconds"):
            description = f"iteration {iteration}: sampling"
            return self.worker.sample(prompts, self._sampling, iteration, self.step, description)

    def _offline_groups(self, iteration: int) -> list[Group]:
        """The iteration's groups from the offline rollouts, rewarded where they came without a reward."""
        count = self.config.rollout.prompts_per_iteration
        groups = [self.offline[g] for g, _ in visits(len(self.offline), iteration, count, self.config.seed)]
        unscored = [group for group in groups if any(output.reward is None for output in group.outputs)]
        with self._timed("sample_seconds"):
            if unscored:
                self.worker.score_rewards(unscored)
        return groups

    def _score(self, iteration: int, groups: Sequence[Group]) -> None:
        """Fills in log p and the policy's log q of every output, and the proposal's log q' where it is to be rescored;
        begins the iteration's record and writes its samples."""
        rollout = self.config.rollout
        rescore = rollout.rescore_proposal and not self.offline
        gap = None
        with self._timed("score_seconds"):
            sampled_GN = output_matrix(groups, "proposal_logprob") if rescore else None
            policy_EGN = self.worker.score(groups, self._temperatures(groups, rescore), self.step == 0)
            if rescore:
                gap = (policy_EGN[-1] - sampled_GN).abs().sum().item() / sum(len(group.outputs) for group in groups)
            for g, group in enumerate(groups):
                for i, output in enumerate(group.outputs):
                    if rescore:
                        output.proposal_logprob = policy_EGN[-1, g, i].item()
                    elif output.proposal_logprob is None:
                        # Offline outputs of an unnamed sampler count as the start model's.
                        output.proposal_logprob = output.prior_logprob
        self._record |= rollout_metrics(groups, rollout.outputs_per_prompt, gap)
        scores = Scores.of(groups, keep_truncated=rollout.truncated == "keep")
        out = self.objective(output_matrix(groups, "policy_logprob"), **vars(scores))
        self._record["groups/zero_gradient"] = int(out.zero_gradient_G.sum())
        self._record["train_seconds"] = 0.0
        if self.writer:
            warn_of_collapse(out.ess_alpha_G.mean().item(), self.config.train.min_ess, rollout.outputs_per_prompt)
            write_samples(self.run_dir, iteration, groups[:_TRAIN_SAMPLES], "train", out.alpha_GN)
            with writing(self.run_dir):
                self._report_nonfinite_rewards(iteration, groups)
                if rollout.save:
                    write_rollout(self.run_dir / "rollouts.jsonl", Rollout(iteration, list(groups)))

    def _report_nonfinite_rewards(self, iteration: int, groups: Sequence[Group]) -> None:
        """Warns where outputs are left out, as train.on_nonfinite=skip has it, and writes their groups."""
        if bad := nonfinite_rewards(groups):
            path = self.run_dir / f"nonfinite_rewards_{iteration}.jsonl"
            write_groups(path, bad)
            what = f"outputs of {len(bad)} groups have no finite reward and are left out"
            warnings.warn(f"iteration {iteration}: {what}; their groups are in {path}", stacklevel=2)

    def _temperatures(self, groups: Sequence[Group], rescore: bool) -> tuple[float, ...]:
        """Those at which the policy is to be scored: 1 where log q is not known yet, and the proposal's."""
        temperature = self.config.rollout.temperature
        if rescore:
            return (1.0,) if temperature == 1.0 else (1.0, temperature)
        known = all(output.policy_logprob is not None for group in groups for output in group.outputs)
        return () if known and not self.offline else (1.0,)

    # Validation.

    def _validation_due(self) -> bool:
        """Whether the iteration that has just ended is one to validate after, and that is still to be done."""
        iterations, within = divmod(self.step, self.config.steps_per_iteration)
        every = iterations % self.config.trainer.val_every_iterations == 0
        last = iterations == self.config.trainer.max_iterations
        return bool(self.held_out) and not within and iterations > self._validated and (every or last)

    def _validate(self, iteration: int, last: bool = False) -> None:
        """Samples for the held-out prompts, compares with the start model, and records it.

        Every validation uses the same draws, so start and current model differ by their weights only.
        """
        prompts = _on_every_rank(lambda: list(self.held_out))
        groups = self.worker.sample(prompts, self._validation, _VALIDATION, self.step, "validation: sampling")
        self.worker.score(groups, (1.0,), self.step == 0)
        if iteration == 0:
            self._start_groups = groups
            self._reference_rewards = self.worker.reference_rewards(prompts)
        result = evaluate(self._start_groups, groups, self._reference_rewards)
        self._score_of_eval, self._validated = result.reward.mean, iteration
        self._write("eval", {"iteration": iteration, **result.as_metrics()})
        if self.writer:
            kind = "start" if iteration == 0 else "final" if last else "validation"
            write_samples(self.run_dir, iteration, groups, kind)

    # Saving and going on.

    def _save(self) -> None:
        state = {
            "step": self.step,
            "record": self._record,
            "score": self._score_of_eval,
            "validated": self._validated,
            "reference_rewards": self._reference_rewards,
        }
        self.checkpointer.save(self._trainer, state, {"rollout": self._rollout, "start": self._start_groups})

    def _restore(self, path: Path) -> None:
        state, groups = read_json(path / "run.json"), read_json(path / "groups.json")
        self.step = state["step"]
        self._record, self._score_of_eval, self._validated = state["record"], state["score"], state["validated"]
        self._reference_rewards = state["reference_rewards"]
        self._rollout, self._start_groups = (groups_from_json(groups[name]) for name in ("rollout", "start"))
        restore_random_states(path)

    def _or_save(self, work: Callable, *args):
        """``work``, which samples; where the run is asked to end meanwhile, it is saved as it was before."""
        try:
            return work(*args)
        except Interrupted:
            self._save()
            self.checkpointer.finish()
            raise

    # Helpers.

    def _write(self, kind: str, fields: dict) -> None:
        if self.writer:
            self.writer.write(kind, self.step, fields)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._record[name] = time.perf_counter() - started


def _on_every_rank(work: Callable):
    """The result of ``work``, which reads files; where that fails on one rank, its ValueError is raised on all."""
    result, error = None, None
    try:
        result = work()
    except ValueError as failure:
        error = failure
    for failure in gathered(error):
        if failure is not None:
            raise failure
    return result


def _peak_memory() -> float:
    """GiB: the device's peak with CUDA, otherwise the process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
