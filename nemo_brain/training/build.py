"""What every kind of training is built from: the sections of a configuration, made into NeMo's and Megatron's objects.

Errors name the configuration key and the remedy.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch import optim as nemo_optim
from nemo.lightning.pytorch.optim import LRSchedulerModule
from nemo.utils import logging as nemo_logging

from nemo_brain.config.common import (
    CheckpointConfig,
    CommonTrainConfig,
    LoggerConfig,
    ModelConfig,
    RanksConfig,
    SplitModelConfig,
    TrainingConfig,
)
from nemo_brain.config.schema import check_names
from nemo_brain.durability.resume import flatten
from nemo_brain.host import cpu
from nemo_brain.host.optimizer import OptimizerModule
from nemo_brain.host.options import (
    STRATEGY_OPTIONS,
)
from nemo_brain.report.mlflow import MLflowLogger
from nemo_brain.training.model import weights_dtype
from nemo_brain.training.strategy import PackedStrategy

Strategy = TypeVar("Strategy", bound=PackedStrategy)

# Arguments of NeMo's schedulers that are not the configuration's to give: NeMo replaces the first, Lightning loses the
# next ones when a run goes on.
_SCHEDULED = {"max_steps", "interval", "frequency", "monitor"}


def reduce_log_noise() -> None:
    """Warnings and errors only from those that describe groups, buckets, configurations or (httpx) every request."""
    nemo_logging.setLevel(logging.WARNING)
    for name in ("megatron", "nemo", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def world_size(trainer: RanksConfig, model: SplitModelConfig) -> int:
    """The number of ranks: those that were started, which the parallel sizes must divide."""
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


def make_optimizer(optim: Mapping[str, Any], trainer: RanksConfig) -> OptimizerModule:
    """``optim``: ``name``, fields of Megatron's OptimizerConfig, and ``sched`` (one of NeMo's LR schedulers)."""
    given = dict(optim)
    sched = given.pop("sched", None)
    given["optimizer"] = given.pop("name", "adam")
    check_names(given, OptimizerConfig, "optim")
    if given["optimizer"] not in ("adam", "sgd"):
        raise ValueError(f"optim.name must be adam or sgd, not {given['optimizer']!r}")
    if not given.get("lr", 0) > 0:
        raise ValueError("optim.lr must be set, and above 0")
    given = {"bf16": trainer.bf16, "params_dtype": weights_dtype(trainer), **given}
    return OptimizerModule(config=OptimizerConfig(**given), lr_scheduler=_scheduler(sched))


def make_ddp(ddp: Mapping[str, Any], optim: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """``ddp``: fields of Megatron's DistributedDataParallelConfig."""
    given = dict(ddp)
    check_names(given, DistributedDataParallelConfig, "ddp")
    if "use_distributed_optimizer" in given:
        raise ValueError("ddp.use_distributed_optimizer has a key of its own: set optim.use_distributed_optimizer")
    if given.get("overlap_param_gather"):
        for key, value in {
            "optim.use_distributed_optimizer": optim.get("use_distributed_optimizer"),
            "ddp.overlap_grad_reduce": given.get("overlap_grad_reduce"),
        }.items():
            if not value:
                raise ValueError(f"ddp.overlap_param_gather needs {key}=true")
    # OptimizerGuard looks at the gradient's norm instead, and names the groups.
    return DistributedDataParallelConfig(**{"check_for_nan_in_grad": False, "grad_reduce_in_fp32": True, **given})


def _scheduler(sched: Mapping[str, Any] | None) -> LRSchedulerModule | None:
    if not sched:
        return None
    options = dict(sched)
    name = options.pop("name", None)
    kinds = {kind.removesuffix("Scheduler"): kind for kind in dir(nemo_optim) if kind.endswith("Scheduler")}
    if name not in kinds:
        raise ValueError(f"optim.sched.name must be one of {', '.join(sorted(kinds))}, not {name!r}")
    for own in _SCHEDULED & options.keys():
        raise ValueError(f"optim.sched.{own}: a schedule moves with every step and is as long as the run: leave it out")
    try:
        return getattr(nemo_optim, kinds[name])(**options)
    except TypeError as error:
        raise ValueError(f"optim.sched: {error}") from None


def check_schedule(optim: OptimizerModule, steps: int) -> None:
    """Warns of a schedule of the learning rate that is longer than the run: NeMo's defaults are for runs of many steps.

    Raises:
        ValueError: it cannot be computed.
    """
    module: Any = optim.lr_scheduler
    if module is None:
        return
    module.max_steps = steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.config.lr)
    try:
        scheduler = module.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
        optimizer.step()  # or torch warns
        for step in range(0, steps + 1, 1 + steps // 1000):
            scheduler.load_state_dict({"last_epoch": step - 1})
            scheduler.step()
    except Exception as error:  # NeMo's are of many types, AssertionError among them
        raise ValueError(
            f"optim.sched: NeMo's {type(module).__name__} fails on the run's {steps} steps "
            f"({type(error).__name__}: {error}): change its arguments, or the schedule"
        ) from error
    parts = {name: getattr(scheduler, name, None) or 0 for name in ("warmup_steps", "constant_steps")}
    if sum(parts.values()) >= steps:
        said = " and ".join(f"optim.sched.{name}={count}" for name, count in parts.items() if count)
        warnings.warn(f"{said}: the run has {steps} steps, so the rest of its schedule is left out", stacklevel=2)


def make_strategy(
    kind: type[Strategy],
    model: ModelConfig,
    trainer: RanksConfig,
    train: CommonTrainConfig,
    checkpoint: CheckpointConfig,
    ddp: DistributedDataParallelConfig,
    seed: int,
    **own: Any,
) -> Strategy:
    """The strategy of one kind; ``own``: that kind's arguments."""
    return kind(
        layout=train.row_layout,
        micro_batch_tokens=train.micro_batch_tokens,
        seed=seed,
        async_save=checkpoint.in_background,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
        pipeline_dtype=weights_dtype(trainer),
        ddp=ddp,
        **STRATEGY_OPTIONS,
        **own,
    )


def make_loggers(logger: LoggerConfig, run_dir: Path) -> list[Logger]:
    loggers: list[Logger] = []
    if logger.tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if logger.wandb is not None:
        loggers.append(WandbLogger(save_dir=run_dir, **logger.wandb))
    return loggers


def begin_logging(config: TrainingConfig, loggers: Sequence[Logger], run_dir: Path) -> list[Any]:
    """What a run's records are given to, ready for them: the loggers, and MLflow's. For rank 0.

    Raises:
        ValueError: naming the key: one cannot be logged to.
    """
    for wandb in loggers:
        if isinstance(wandb, WandbLogger):
            try:
                _ = wandb.experiment  # its run begins here
            except Exception as error:
                raise ValueError(
                    f"logger.wandb: W&B cannot be logged to ({type(error).__name__}: {error}): log in (WANDB_API_KEY), "
                    "or set logger.wandb.offline=true, or logger.wandb=null"
                ) from error
    mlflow = config.logger.mlflow
    if mlflow is None:
        return list(loggers)
    parameters = flatten(dataclasses.asdict(config))
    return [*loggers, MLflowLogger(run_dir, mlflow.tracking_uri, mlflow.experiment, mlflow.run_name, parameters)]


def make_trainer(
    trainer: RanksConfig,
    loggers: Sequence[Logger],
    strategy: PackedStrategy,
    max_steps: int,
    callbacks: Sequence[pl.Callback],
    log_every_steps: int = 1,
) -> nl.Trainer:
    plugins = []
    if trainer.bf16:
        plugins.append(
            nl.MegatronMixedPrecision(
                precision="bf16-mixed",
                params_dtype=torch.bfloat16,
                pipeline_dtype=torch.bfloat16,
                autocast_enabled=False,
                # NeMo takes it from here rather than from the strategy.
                grad_reduce_in_fp32=strategy.ddp_config.grad_reduce_in_fp32,
                fp8=trainer.fp8,
                fp8_recipe=trainer.fp8_recipe,
            )
        )
    on_cpu = cpu.enable()
    if trainer.accelerator == "gpu" and on_cpu:
        raise ValueError("trainer.accelerator=gpu, but no CUDA device is visible: use auto or cpu")
    return nl.Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy,
        plugins=plugins,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=list(loggers),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=log_every_steps,
        use_distributed_sampler=False,
    )
