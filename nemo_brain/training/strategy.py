"""The MegatronStrategy of ours: a training step over groups, scoring passes, sampling, and the prior's placement."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from megatron.core import parallel_state, tensor_parallel
from nemo.lightning import MegatronStrategy
from nemo.lightning._strategy_lib import set_model_parallel_attributes
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

from nemo_brain.durability.guards import OptimizerGuard
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.weights import Weights, load_weights


class PackedStrategy(MegatronStrategy):
    """MegatronStrategy for chunks that take packed rows.

    Args:
        layout, micro_batch_tokens: how groups are packed, see ``passes.GroupPasses``.
        seed: of Megatron's random-number tracker.
        **options: MegatronStrategy's own.
    """

    def __init__(self, *, layout: str, micro_batch_tokens: int, seed: int, **options):
        super().__init__(**options)
        self.layout = layout
        self.micro_batch_tokens = micro_batch_tokens
        self._seed = seed

    def setup_distributed(self) -> None:
        """NeMo's, and Megatron's random-number tracker where NeMo leaves it unseeded: on a machine without a GPU."""
        super().setup_distributed()
        if not torch.cuda.is_available():
            tensor_parallel.model_parallel_cuda_manual_seed(
                self._seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
            )

    def setup(self, trainer) -> None:
        """NeMo's; ``chunks`` are this rank's part of the model from then on, ``guards`` watch its optimizers."""
        super().setup(trainer)
        self.chunks = [module.module for module in self.megatron_parallel]
        self.guards = [OptimizerGuard(optimizer.mcore_optimizer) for optimizer in self.optimizers]

    def settle(self) -> None:
        """Ends an overlapped gather of the weights: forward passes wait for it themselves, other readers do not."""
        if self.ddp_config.overlap_param_gather:
            self.megatron_parallel.force_param_sync()

    def connected(self, config: PackedGPTConfig) -> PackedGPTConfig:
        """The configuration with the parallel layout and the precision of the model in training."""
        holder = SimpleNamespace(config=config, configure_model=config.configure_model)
        config = set_model_parallel_attributes(holder, self.parallelism)
        dtypes = getattr(self.precision_plugin, "dtype_config", None)
        return update_config_with_dtype_overrides(dtypes, config) if dtypes else config

    def more_chunks(self, config: PackedGPTConfig, weights: Weights) -> list[torch.nn.Module]:
        """This rank's chunks of one more model, which is not trained.

        Args:
            config: has the parallel layout and the precision of the model in training: ``connected`` gives them.
        """
        config = copy.copy(config)
        # Synchronisation of gradients and parameters is none of its business.
        config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
        config.finalize_model_grads_func = config.grad_scale_func = None
        chunks = []
        for stage in range(len(self.chunks)):
            chunk = config.configure_model(weights.tokenizer, vp_stage=stage)
            load_weights([chunk], weights)
            if torch.cuda.is_available():
                chunk.cuda(torch.cuda.current_device())
            if hasattr(self.precision_plugin, "convert_module"):
                # NeMo's precision plugin converts the module inside a Lightning module.
                holder = torch.nn.Module()
                holder.module, holder.config = chunk, config
                chunk = self.precision_plugin.convert_module(holder).module
            chunks.append(chunk.eval().requires_grad_(False))
        return chunks

    def training_step(self, dataloader_iter, *args, **kwargs) -> dict[str, torch.Tensor]:
        """The forward and backward passes of one optimizer step, which is what the data loader gives."""
        step, *_ = next(dataloader_iter)
        with self.precision_plugin.train_step_context():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            return {"loss": self.run_step(step)}

    def run_step(self, step) -> torch.Tensor:
        """Accumulates the step's gradient, sets its ``result`` and returns the loss."""
        raise NotImplementedError
