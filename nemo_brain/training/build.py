"""What every kind of training is built from: the sections of a configuration, made into NeMo's and Megatron's objects.

Errors name the configuration key and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import operator
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch import optim as nemo_optim
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.utils import logging as nemo_logging

from nemo_brain.config.brain import ModelConfig, TrainingConfig
from nemo_brain.convert.export import check_target, make_export
from nemo_brain.convert.open import start_weights
from nemo_brain.durability.supervision import Supervisor
from nemo_brain.host import cpu
from nemo_brain.model.gpt import HAVE_TRANSFORMER_ENGINE, PackedGPTConfig
from nemo_brain.model.lora import LoRA
from nemo_brain.model.weights import Weights
from nemo_brain.training.strategy import PackedStrategy


def quiet() -> None:
    """Warnings and errors only from those that describe groups, buckets, configurations or (httpx) every request."""
    nemo_logging.setLevel(logging.WARNING)
    for name in ("megatron", "nemo", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def world_size(config: TrainingConfig) -> int:
    """The number of ranks: those that were started, which the parallel sizes must divide."""
    trainer, model = config.trainer, config.model
    started = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if trainer.devices is None:
        trainer.devices = local
    world = trainer.devices * trainer.num_nodes
    if world != started:
        raise ValueError(
            f"trainer.devices ({trainer.devices}) x trainer.num_nodes ({trainer.num_nodes}) is {world}, but the number "
            f"of processes started is {started}: start them with torchrun, leave trainer.devices unset and set "
            "trainer.num_nodes to torchrun's --nnodes"
        )
    split = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if world % split:
        raise ValueError(
            f"model.tensor_model_parallel_size ({model.tensor_model_parallel_size}) x "
            f"model.pipeline_model_parallel_size ({model.pipeline_model_parallel_size}) must divide the number of "
            f"processes ({world}): start more (torchrun --nproc-per-node) or lower the sizes"
        )
    return world


def make_weights(config: TrainingConfig) -> Weights:
    model = config.model
    if model.restore_from is not None and model.gpt:
        raise ValueError("model.gpt describes a model from scratch: set model.gpt=null with model.restore_from")
    weights = start_weights(model.restore_from, model.gpt, model.tokenizer, config.seed)
    if len(weights.tokenizer) > weights.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(weights.tokenizer)} tokens, the checkpoint model.restore_from="
            f"{config.model.restore_from} only {weights.vocab_size}: they do not belong together"
        )
    return weights


def make_gpt_config(
    config: TrainingConfig,
    weights: Weights,
    kind: type[PackedGPTConfig] = PackedGPTConfig,
    output_key: str = "rollout.max_new_tokens",
) -> PackedGPTConfig:
    """The configuration of a model of ``weights`` for the longest prompts and outputs (``output_key``)."""
    model = config.model
    given = dict(weights.gpt_config)
    _known(given, PackedGPTConfig, "model.gpt")
    for item in dataclasses.fields(ModelConfig):
        for section in ("gpt", "options"):
            if item.name in (getattr(model, section) or {}):
                raise ValueError(f"model.{section}.{item.name} has a key of its own: set model.{item.name}")
    _known(model.options, PackedGPTConfig, "model.options")
    for name, value in model.options.items():
        if given.setdefault(name, value) != value:
            raise ValueError(
                f"model.options.{name}={value} contradicts the model's {name}={given[name]}: options say how a model "
                "is run, not what it is"
            )
    if given.get("vocab_size", weights.vocab_size) != weights.vocab_size:
        raise ValueError(f"model.gpt.vocab_size must be the tokenizer's {weights.vocab_size}: leave it out")
    for name in ("hidden_dropout", "attention_dropout"):
        if given.setdefault(name, 0.0) != 0.0:
            raise ValueError(
                f"model.gpt.{name} must be 0: with dropout the policy is not the law that was sampled from"
            )
    if given.get("num_moe_experts"):
        raise ValueError("model.gpt.num_moe_experts is not supported: the router's statistics depend on the packing")
    for needed in ("num_layers", "hidden_size", "num_attention_heads"):
        if not given.get(needed):
            raise ValueError(f"model.gpt.{needed} is needed: set model.restore_from, or describe a model in model.gpt")
    if config.trainer.fp8 is not None and not HAVE_TRANSFORMER_ENGINE:
        raise ValueError("trainer.fp8 needs Transformer Engine, which is not installed: leave it null")
    heads, groups = given["num_attention_heads"], given.get("num_query_groups") or given["num_attention_heads"]
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if heads % tensor or groups % tensor:
        raise ValueError(
            f"model.tensor_model_parallel_size ({tensor}) must divide the {heads} attention heads and the {groups} "
            "key-value heads"
        )
    stages = pipeline * (model.virtual_pipeline_model_parallel_size or 1)
    if given["num_layers"] % stages:
        raise ValueError(
            f"the {given['num_layers']} layers do not divide over {stages} stages: change "
            "model.pipeline_model_parallel_size or model.virtual_pipeline_model_parallel_size"
        )
    if given["hidden_size"] % heads and not given.get("kv_channels"):
        raise ValueError(f"model.gpt.hidden_size ({given['hidden_size']}) must be a multiple of the {heads} heads")
    options: dict[str, Any] = {
        "vocab_size": weights.vocab_size,
        "seq_length": 1024,
        "params_dtype": _dtype(config),
        "pipeline_dtype": _dtype(config),
        # Rows differ in length; Megatron ties the option to this dispatcher even for dense models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "cross_entropy_loss_fusion": False,
    }
    if model.virtual_pipeline_model_parallel_size is not None:
        # With batched, deallocating communication the interleaved schedule computes wrong losses at two stages.
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}
    if model.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        options["recompute_granularity"] = "selective"
    if not torch.cuda.is_available():
        options |= {
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
        }
    gpt = kind(**{**options, **given})
    longest = config.data.max_prompt_tokens + operator.attrgetter(output_key)(config)
    if longest > gpt.seq_length:
        raise ValueError(
            f"data.max_prompt_tokens + {output_key} is {longest}, more than the model's {gpt.seq_length} "
            "positions (model.gpt.seq_length): lower them"
        )
    return gpt


def check_export(config: TrainingConfig, gpt: PackedGPTConfig, weights: Weights) -> None:
    """ValueError where ``model.export_to`` will not be possible."""
    if config.model.export_to is not None:
        make_export(gpt, weights.vocab_size, weights.tokenizer, "model.export_to")
        check_target(config.model.export_to, "model.export_to")


def _dtype(config: TrainingConfig) -> torch.dtype:
    """Of the weights and of what passes between pipeline stages."""
    return torch.bfloat16 if config.bf16 else torch.float32


def make_lora(config: TrainingConfig) -> LoRA | None:
    peft = config.model.peft
    return None if peft is None else LoRA(peft.dim, peft.alpha, tuple(peft.target_modules), config.seed)


def make_optimizer(config: TrainingConfig) -> MegatronOptimizerModule:
    """``optim``: ``name``, fields of Megatron's OptimizerConfig, and ``sched`` (one of NeMo's LR schedulers)."""
    given = dict(config.optim)
    sched = given.pop("sched", None)
    given["optimizer"] = given.pop("name", "adam")
    _known(given, OptimizerConfig, "optim")
    if given["optimizer"] not in ("adam", "sgd"):
        raise ValueError(f"optim.name must be adam or sgd, not {given['optimizer']!r}")
    if not given.get("lr", 0) > 0:
        raise ValueError("optim.lr must be set, and above 0")
    given = {"bf16": config.bf16, "params_dtype": _dtype(config), **given}
    return MegatronOptimizerModule(config=OptimizerConfig(**given), lr_scheduler=_scheduler(sched))


def make_ddp(config: TrainingConfig) -> DistributedDataParallelConfig:
    """``ddp``: fields of Megatron's DistributedDataParallelConfig."""
    given = dict(config.ddp)
    _known(given, DistributedDataParallelConfig, "ddp")
    if "use_distributed_optimizer" in given:
        raise ValueError("ddp.use_distributed_optimizer has a key of its own: set optim.use_distributed_optimizer")
    if given.get("overlap_param_gather"):
        for key, value in {
            "optim.use_distributed_optimizer": config.optim.get("use_distributed_optimizer"),
            "ddp.overlap_grad_reduce": given.get("overlap_grad_reduce"),
        }.items():
            if not value:
                raise ValueError(f"ddp.overlap_param_gather needs {key}=true")
    # guards.OptimizerGuard looks at the gradient's norm instead, and names the groups.
    return DistributedDataParallelConfig(**{"check_for_nan_in_grad": False, **given})


def _scheduler(sched: Mapping | None):
    if not sched:
        return None
    options = dict(sched)
    name = options.pop("name", None)
    kinds = {kind.removesuffix("Scheduler"): kind for kind in dir(nemo_optim) if kind.endswith("Scheduler")}
    if name not in kinds:
        raise ValueError(f"optim.sched.name must be one of {', '.join(sorted(kinds))}, not {name!r}")
    try:
        return getattr(nemo_optim, kinds[name])(**options)
    except TypeError as error:
        raise ValueError(f"optim.sched: {error}") from None


def _known(given: Mapping, kind: type, key: str) -> None:
    names = [item.name for item in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"unknown configuration key {key}.{name}: {kind.__name__} has no such field{hint}")


def make_strategy(config: TrainingConfig, kind: type[PackedStrategy], **own) -> PackedStrategy:
    """The strategy of one kind; ``own``: that kind's arguments."""
    model = config.model
    return kind(
        layout=config.layout,
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.seed,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
        pipeline_dtype=_dtype(config),
        ddp=make_ddp(config),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,
        # NeMo's progress bar gathers on rank 0 alone, which the other ranks' collectives do not survive on gloo.
        replace_progress_bar=False,
        # Longer than the supervisor waits, which has more to say.
        timeout=timedelta(minutes=config.trainer.hang_timeout_minutes + 2),
        **own,
    )


def make_trainer(
    config: TrainingConfig, strategy: PackedStrategy, max_steps: int, callbacks: list[pl.Callback]
) -> nl.Trainer:
    trainer = config.trainer
    plugins = []
    if config.bf16:
        plugins.append(
            nl.MegatronMixedPrecision(
                precision="bf16-mixed",
                params_dtype=torch.bfloat16,
                pipeline_dtype=torch.bfloat16,
                autocast_enabled=False,
                # NeMo takes it from here rather than from the ddp section.
                grad_reduce_in_fp32=config.ddp.get("grad_reduce_in_fp32", True),
                fp8=trainer.fp8,
                fp8_recipe=trainer.fp8_recipe,
            )
        )
    on_cpu = cpu.enable()
    if trainer.accelerator == "gpu" and on_cpu:
        raise ValueError("trainer.accelerator=gpu, but no CUDA device is visible: use auto or cpu")
    loggers: list = []
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(config.run_dir, name="", version="tensorboard"))
    if config.logger.wandb is not None:
        loggers.append(WandbLogger(save_dir=config.run_dir, **config.logger.wandb))
    return nl.Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy,
        plugins=plugins,
        max_steps=max_steps,
        callbacks=[Supervisor(trainer.hang_timeout_minutes, Path(config.run_dir)), *callbacks],
        logger=loggers,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=trainer.log_every_steps,
        use_distributed_sampler=False,
    )
