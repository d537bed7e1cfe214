"""The MegatronStrategy of ours: a training step over groups, scoring passes, sampling, and the prior's placement."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from nemo_brain.core.groups import Group, Prompt
from nemo_brain.durability.checkpoint import read_json
from nemo_brain.durability.saving import fingerprint, first_intact
from nemo_brain.host.torch_dist import InProcessSave, loading, loading_optimizers
from nemo_brain.sampling.sampler import Sampler, SamplingOptions
from nemo_brain.training.brain.passes import BRAInPasses, Scores, StepResult
from nemo_brain.training.brain.prior import AdapterOffPrior, OffloadedPrior, ResidentPrior
from nemo_brain.training.strategy import PackedStrategy


@dataclass
class TrainStep:
    """One optimizer step: the groups of a global batch (the same on every rank) and, where the training kernels have
    scored the policy since its last change, its log-probs [G, N]. ``result`` is filled in by the step."""

    iteration: int
    groups: Sequence[Group]
    scores: Scores
    policy_logprobs_GN: torch.Tensor | None = None
    result: StepResult | None = None


class BRAInStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``TrainStep``s.

    Args:
        prior_placement: ``resident``, ``offload`` or, for a model with adapters, ``adapter_off``: see ``prior``.
        async_save: checkpoints are written while training goes on, see ``Checkpointer``.
        **options: PackedStrategy's own.
    """

    def __init__(self, *, prior_placement: str, async_save: bool, **options):
        super().__init__(**options)
        self._async_save = async_save
        self._prior_placement = prior_placement
        self.resume_candidates: Sequence[Path] = ()
        self.resumed_from: Path | None = None

    def setup(self, trainer) -> None:
        """NeMo's, then the passes and the prior, which is the model as it stands before any checkpoint is restored."""
        super().setup(trainer)
        model = self.lightning_module
        self.passes = BRAInPasses(model.config, self.layout, self.micro_batch_tokens)
        if self._prior_placement == "adapter_off":
            self._prior = AdapterOffPrior()
        elif self._prior_placement == "offload":
            self._prior = OffloadedPrior(self.chunks)
        else:
            self._prior = ResidentPrior(self.more_chunks(model.config, model.weights))
        self.prior_fingerprint = fingerprint(self.chunks, model.config.vocab_size)
        self.saver = InProcessSave(copy=self._async_save)
        save: SaveShardedStrategy = self.saver
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if replicas.size() > 1:  # each writes its share of what all of them hold
            save = FullyParallelSaveStrategyWrapper(save, replicas)
        self.unwrapped_checkpoint_io._save_sharded_strategy = save

    def load_checkpoint(self, checkpoint_path, selective_restore: bool = False) -> dict:
        """NeMo's, of the first of ``resume_candidates`` that is intact; ``resumed_from`` names it.

        Raises:
            ValueError: on every rank, when there is none, or when it belongs to another prior.
        """
        path = self.resumed_from = first_intact(self.resume_candidates)
        if read_json(path / "run.json")["prior"] != self.prior_fingerprint:
            raise ValueError(
                f"checkpoint.resume: {path} was written with another start model, which is the prior: set "
                "model.restore_from (or model.gpt and seed) to what it was, or start anew with checkpoint.resume=never"
            )
        with loading(self.optimizers):
            return super().load_checkpoint(path, selective_restore)

    def load_model_state_dict(self, checkpoint, strict: bool = True) -> None:
        """NeMo's. A checkpoint of a model with adapters holds nothing else (see ``PackedGPTModel.sharded_state_dict``);
        that all of them are in it was seen when it was read."""
        super().load_model_state_dict(checkpoint, strict=strict and self.lightning_module.lora is None)

    def load_optimizer_state_dict(self, checkpoint, selective_restore: bool = False) -> None:
        """NeMo's."""
        with loading_optimizers(self.optimizers):
            super().load_optimizer_state_dict(checkpoint, selective_restore)

    def run_step(self, step: TrainStep) -> torch.Tensor:
        step.result = self.passes.train(
            self.chunks, step.groups, step.scores, self.lightning_module.objective, step.policy_logprobs_GN
        )
        return step.result.objective.loss_G.mean()

    def policy_logprobs(
        self, groups: Sequence[Group], temperatures: tuple[float, ...], on_tokens: Callable[[int], None]
    ) -> torch.Tensor:
        """log q of the policy as it stands, by the training kernels: [E, G, N], the same on every rank."""
        return self.passes.logprobs(self.chunks, groups, temperatures, on_tokens)

    @contextlib.contextmanager
    def prior(self, alone: bool = False) -> Iterator[Callable[..., torch.Tensor]]:
        """While the context lasts: ``f(groups, on_tokens)`` gives log p by the training kernels: [G, N], the same on
        every rank; with ``alone``, on those of this model-parallel group, whose own groups they are."""
        self.settle()
        with self._prior.chunks(self.chunks) as chunks:
            yield lambda groups, on_tokens: self.passes.logprobs(chunks, groups, (1.0,), on_tokens, alone)[0]

    def sample(
        self,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        seed: int,
        iteration: int,
        on_outputs: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, Group]]:
        """Groups sampled from the policy as it stands, by this rank's model-parallel group: see ``Sampler.sample``."""
        self.settle()
        model = self.lightning_module
        sampler = Sampler(self.chunks, model.config, model.tokenizer, options)
        return sampler.sample(prompts, seed, iteration, on_outputs, stop)
