"""The two-pass route collects log q in advance only where it has to, and the offloaded prior gives the policy back."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from ranks import run_ranks
from toy_runs import recorded_run

from nemo_brain.model.passes import GroupPasses

# One iteration of 2 epochs x 2 steps on 4 groups, without validation.
RUN = (
    "trainer.max_iterations=1",
    "rollout.prompts_per_iteration=4",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=2",
    "train.epochs_per_iteration=2",
    "data.holdout=0",
)
ONE_ROW = "train.micro_batch_tokens=1"


def _count_scoring_passes(*overrides: str) -> int:
    calls = []
    original = GroupPasses.logprobs

    def counted(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    GroupPasses.logprobs = counted
    recorded_run(*RUN, *overrides)
    return len(calls)


def test_scoring_passes_of_an_iteration():
    """The prior and the refreshed policy are scored once each, and by one pass while they are the same; two pass adds
    one for each step but the first, whose log q the refresh has just scored, unless the proposal was not rescored by
    the training kernels."""
    assert run_ranks(_count_scoring_passes, 1) == [1]
    assert run_ranks(_count_scoring_passes, 1, "trainer.max_iterations=2") == [1 + 2]
    assert run_ranks(_count_scoring_passes, 1, ONE_ROW) == [1 + 3]
    assert run_ranks(_count_scoring_passes, 1, ONE_ROW, "rollout.rescore_proposal=false") == [1 + 4]


class _Swaps(pl.Callback):
    """Whether scoring with the offloaded prior uses the start weights and leaves the policy's own bit by bit."""

    def on_train_start(self, trainer, module) -> None:
        self.start = self._weights(trainer)

    def on_train_end(self, trainer, module) -> None:
        policy = self._weights(trainer)
        assert not torch.equal(policy, self.start)
        strategy = trainer.strategy
        with strategy._prior.chunks(strategy.chunks):
            assert torch.equal(self._weights(trainer), self.start)
        assert torch.equal(self._weights(trainer), policy)

    @staticmethod
    def _weights(trainer) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for chunk in trainer.strategy.chunks for p in chunk.parameters()])


def _swap_run() -> None:
    recorded_run(*RUN, "prior.placement=offload", callbacks=[_Swaps()])


def test_the_offloaded_prior_is_the_start_model_and_returns_the_policy():
    run_ranks(_swap_run, 1)
