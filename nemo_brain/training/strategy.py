"""The MegatronStrategy of ours: optimizer steps over packed rows, sampling, further models, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from nemo.lightning import MegatronStrategy

from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.ranks import raise_on_all_ranks
from nemo_brain.durability.checkpoint import read_json
from nemo_brain.durability.saving import fingerprint, first_intact
from nemo_brain.host import cpu, second_model
from nemo_brain.host.checkpointing import InProcessSave, loading, loading_optimizers, save_with, share_step
from nemo_brain.host.distributed import make_groups
from nemo_brain.host.optimizer import OptimizerGuard, keeping_settings, move_schedules
from nemo_brain.host.trainer import lift_step_limit
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.weights import Weights, load_weights
from nemo_brain.sampling.sampler import Sampler, SamplingOptions


class StepResult(Protocol):
    """What a step's passes came to, the same on every rank: the number of row positions that they took (over all
    ranks, without padding), and the loss before the step."""

    tokens: int

    @property
    def loss(self) -> float: ...


class PackedStrategy(MegatronStrategy):
    """MegatronStrategy for chunks that take packed rows.

    Args:
        layout, micro_batch_tokens: how groups are packed, see ``model.passes.GroupPasses``.
        seed: of Megatron's random-number tracker.
        async_save: checkpoints are written while training goes on, see ``durability.saving.Checkpointer``.
        **options: MegatronStrategy's own.
    """

    def __init__(self, *, layout: str, micro_batch_tokens: int, seed: int, async_save: bool, **options: Any):
        super().__init__(**options)
        self.layout = layout
        self.micro_batch_tokens = micro_batch_tokens
        self.saver = InProcessSave(copy=async_save)
        self.chunks: list[torch.nn.Module] = []  # this rank's part of the model, once it has been set up
        self.guards: list[OptimizerGuard] = []
        self.fingerprint = ""  # of the start model
        self.resume_candidates: Sequence[Path] = ()
        self.resumed_from: Path | None = None
        self.last_result: StepResult | None = None
        self._seed = seed

    def setup_distributed(self) -> None:
        """NeMo's; Megatron's groups, which it leaves out where the ranks have met before (``host.distributed``); and
        Megatron's random-number tracker where NeMo leaves it unseeded: on a machine without a GPU."""
        super().setup_distributed()
        make_groups(self)
        cpu.seed_tracker(self._seed)

    def setup(self, trainer: pl.Trainer) -> None:
        """NeMo's, for the model as it stands before any checkpoint is restored; ``guards`` watch its optimizers.

        Raises:
            ValueError: on every rank, when the start weights cannot be loaded on one.
        """
        super().setup(trainer)
        raise_on_all_ranks([error for module in self.megatron_parallel for error in module.load_errors])
        # NeMo has read from it how long the learning rate's schedule is. When training ends, its loop says.
        lift_step_limit(trainer)
        self.chunks = [module.module for module in self.megatron_parallel]
        self.guards = [OptimizerGuard(optimizer.mcore_optimizer) for optimizer in self.optimizers]
        self.fingerprint = fingerprint(self.chunks, self.lightning_module.config.vocab_size)
        save_with(self.unwrapped_checkpoint_io, self.saver)

    def wait_for_param_gather(self) -> None:
        """Ends an overlapped gather of the weights: forward passes wait for it themselves, other readers do not."""
        if self.ddp_config.overlap_param_gather:
            self.megatron_parallel.force_param_sync()

    def with_parallel_layout(self, config: PackedGPTConfig) -> PackedGPTConfig:
        """The configuration with the parallel layout and the precision of the model in training."""
        return second_model.with_parallel_layout(config, self)

    def build_frozen_chunks(self, config: PackedGPTConfig, weights: Weights) -> list[torch.nn.Module]:
        """This rank's chunks of one more model, which is not trained.

        Args:
            config: has the parallel layout and the precision of the model in training: see ``with_parallel_layout``.

        Raises:
            ValueError: on every rank, when the weights cannot be loaded on one.
        """
        config = second_model.untrained(config)
        chunks: list[torch.nn.Module] = []
        errors: list[Exception] = []
        chunk: Any
        for stage in range(len(self.chunks)):
            chunk = config.configure_model(weights.tokenizer, vp_stage=stage)
            try:
                load_weights([chunk], weights)
            except ValueError as error:  # the others wait for this rank while they build theirs
                errors.append(error)
            if torch.cuda.is_available():
                chunk.cuda(torch.cuda.current_device())
            chunk = second_model.in_precision(chunk, config, self)
            chunks.append(chunk.eval().requires_grad_(False))
        raise_on_all_ranks(errors)
        return chunks

    def training_step(self, dataloader_iter: Iterator, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The forward and backward passes of one optimizer step, whose batch the training data gives."""
        batch, *_ = next(dataloader_iter)
        with self.precision_plugin.train_step_context():
            chunk: Any
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.last_result = self.run_step(batch)
        return {"loss": torch.tensor(self.last_result.loss)}

    def run_step(self, batch: Any) -> StepResult:
        """Accumulates the gradient of the batch's loss."""
        raise NotImplementedError

    def sample(
        self,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        seed: int,
        iteration: int,
        on_outputs: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, SampledGroup]]:
        """Groups sampled from the model as it stands, by this rank's model-parallel group: see ``Sampler.sample``."""
        self.wait_for_param_gather()
        return self.sampler(self.chunks, options).sample(prompts, seed, iteration, on_outputs, stop)

    def sampler(self, chunks: Sequence[torch.nn.Module], options: SamplingOptions) -> Sampler:
        """Samples from chunks of the model's kind."""
        model = self.lightning_module
        return Sampler(chunks, model.config, model.tokenizer, options)

    # Checkpoints.

    def save_weights(self, path: Path) -> None:
        """Model, optimizer and scheduler; ``saver`` writes what it has taken. A collective of all ranks."""
        self.trainer.save_checkpoint(path)

    def optimizer_sharded_state_dict(self, is_loading: bool = False, metadata: dict | None = None) -> dict:
        """NeMo's, with what a rank lacks that trains nothing."""
        state = super().optimizer_sharded_state_dict(is_loading, metadata)
        return state if is_loading else share_step(state)

    def load_checkpoint(self, checkpoint_path: Any, selective_restore: bool = False) -> dict:
        """NeMo's, of the first of ``resume_candidates`` that is intact; ``resumed_from`` names it.

        Raises:
            ValueError: on every rank, when there is none, or when it belongs to another start model.
        """
        path = self.resumed_from = first_intact(self.resume_candidates)
        if read_json(path / "run.json")["start_model"] != self.fingerprint:
            raise ValueError(
                f"checkpoint.resume: {path} was written with another start model, which is the prior: set "
                "model.restore_from (or model.gpt and seed) to what it was, or start anew with checkpoint.resume=never"
            )
        with loading(self.optimizers):
            return super().load_checkpoint(path, selective_restore)

    def load_model_state_dict(self, checkpoint: dict, strict: bool = True) -> None:
        """NeMo's. A checkpoint of a model with adapters holds nothing else (see ``PackedGPTModel.sharded_state_dict``);
        that all of them are in it was seen when it was read."""
        super().load_model_state_dict(checkpoint, strict=strict and self.lightning_module.lora is None)

    def load_optimizer_state_dict(self, checkpoint: dict, selective_restore: bool = False) -> None:
        """NeMo's, of the optimizer's states: its settings and the learning rate's schedule are the configuration's."""
        with loading_optimizers(self.optimizers), keeping_settings(self.optimizers):
            super().load_optimizer_state_dict(checkpoint, selective_restore)
        checkpoint["lr_schedulers"] = move_schedules(self.lr_scheduler_configs, checkpoint["global_step"])
