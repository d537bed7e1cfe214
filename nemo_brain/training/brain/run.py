"""Puts a run together from its configuration: model, strategy, trainer, data, reward, loop."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from nemo import lightning as nl
from omegaconf import DictConfig, OmegaConf

from nemo_brain.config.brain import Config, check
from nemo_brain.convert.adapter import export_adapter
from nemo_brain.convert.export import check_target, export_model, make_export
from nemo_brain.convert.mapping import MappedExport
from nemo_brain.core.interruption import Interrupted
from nemo_brain.data.prompts import load_prompts
from nemo_brain.data.rollouts import read_rollouts
from nemo_brain.durability.resume import candidates, check_configuration, write_status
from nemo_brain.durability.saving import Checkpointer
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.lora import LoRA
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.model.weights import Weights
from nemo_brain.objectives import OBJECTIVES, Objective, make_objective
from nemo_brain.report.metrics import locked, prepare_run_dir, read_metrics
from nemo_brain.report.page import write_report
from nemo_brain.report.progress import summary_lines
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.megatron import MegatronReward
from nemo_brain.training.brain.loop import BRAInLoop
from nemo_brain.training.brain.nemo_model import BRAInGPTModel
from nemo_brain.training.brain.remote_rollout import RemoteRollout
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import (
    make_ddp,
    make_gpt_config,
    make_lora,
    make_optimizer,
    make_strategy,
    make_trainer,
    make_weights,
    quiet,
    world_size,
)


def run(cfg: DictConfig, callbacks: list[pl.Callback] | None = None) -> BRAInGPTModel:
    """Trains as the configuration says and leaves the results in its ``run_dir``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
        Interrupted: on every rank, when the run was asked to end early; it has been saved.
    """
    quiet()
    config = check(cfg)
    world_size(config.trainer, config.model)
    objective = _objective(config)
    reward = make_reward(config.reward)
    weights = make_weights(config.model, config.seed)
    gpt = make_gpt_config(config.model, config.trainer, weights, config.lengths)
    if isinstance(reward, MegatronReward):
        reward_gpt = make_gpt_config(config.model, config.trainer, reward.weights, config.lengths, RewardGPTConfig)
        reward.configure(reward_gpt, weights.tokenizer, config.data.template)
    remote = RemoteRollout(config, gpt, weights) if config.rollout.remote is not None else None
    lora = make_lora(config.model.peft, config.seed)
    callbacks = [*(callbacks or []), _export_at_end(config, gpt, weights, lora)]
    optim = make_optimizer(config.optim, config.trainer)
    prompts, offline, held_out = _data(config, weights.tokenizer)
    rank_zero = int(os.environ.get("RANK", 0)) == 0
    run_dir = Path(config.run_dir)
    with locked(run_dir) if rank_zero else contextlib.nullcontext():
        configuration = dataclasses.asdict(config)
        earlier = candidates(config)
        changes = check_configuration(config, earlier[0], configuration) if earlier else []
        if rank_zero:
            prepare_run_dir(run_dir, resume=bool(earlier) and earlier[0].parent.parent == run_dir)
            if earlier:
                print("\n  ".join([f"resuming from {earlier[0]}", *changes]))
            (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        checkpointer = Checkpointer(config.checkpoint, run_dir / "checkpoints", configuration)
        loop = BRAInLoop(config, prompts, offline, held_out, reward, remote, run_dir, checkpointer)
        strategy = make_strategy(
            BRAInStrategy,
            config.model,
            config.trainer,
            config.train,
            make_ddp(config.ddp, config.optim),
            config.seed,
            prior_placement=config.prior.placement,
            async_save=config.checkpoint.in_background,
        )
        model = BRAInGPTModel(gpt, weights, objective, lora, optim)
        strategy.resume_candidates = earlier
        max_steps = config.trainer.max_iterations * config.steps_per_iteration
        trainer = make_trainer(config.trainer, config.logger, run_dir, strategy, max_steps, [loop, *callbacks])
        _fit(trainer, model, loop, rank_zero)
    return model


def _fit(trainer: nl.Trainer, model: BRAInGPTModel, loop: BRAInLoop, rank_zero: bool) -> None:
    """Trains; rank 0 keeps status.json and writes the report."""
    state = "running"
    if rank_zero:
        write_status(loop.run_dir, state, loop.step)
    try:
        earlier = trainer.strategy.resume_candidates
        trainer.fit(model, train_dataloaders=loop, ckpt_path=str(earlier[0]) if earlier else None)
        state = "finished"
    except Interrupted:
        state = "interrupted"
        raise
    finally:
        if rank_zero:
            with contextlib.suppress(OSError):  # a full disk has ended the run with an error of its own
                write_status(loop.run_dir, "failed" if state == "running" else state, loop.step)
    if rank_zero:
        report = write_report(loop.run_dir)
        print("\n".join(summary_lines(read_metrics(loop.run_dir / "metrics.jsonl"), report)))


def _export_at_end(config: Config, gpt: PackedGPTConfig, weights: Weights, lora: LoRA | None) -> pl.Callback:
    """Writes what ``model.export_to`` and ``model.export_adapter_to`` ask for when training ends.

    Raises:
        ValueError: now, if that will not be possible.
    """
    model = config.model
    merged = adapter = None
    if model.export_to is not None:
        merged = _export("model.export_to", model.export_to, gpt, weights)
    if model.export_adapter_to is not None:
        adapter = _export("model.export_adapter_to", model.export_adapter_to, gpt, weights)

    def write(trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.strategy.settle()
        if merged is not None:
            export_model(trainer.strategy.chunks, merged, model.export_to)
        if adapter is not None:
            export_adapter(trainer.strategy.chunks, adapter, lora, model.restore_from, model.export_adapter_to)

    # Not after fit: with CUDA, Lightning has moved the weights to the host by then.
    return LambdaCallback(on_train_end=write)


def _export(key: str, directory: str, gpt: PackedGPTConfig, weights: Weights) -> MappedExport:
    check_target(directory, key)
    return make_export(gpt, weights.vocab_size, weights.tokenizer, key)


def _objective(config: Config) -> Objective:
    options = config.objective_options
    if config.objective.name in OBJECTIVES:
        # conf/brain.yaml sets these for brain: an objective without them is not to stumble over them.
        for name in {"gamma", "goodness"} - inspect.signature(OBJECTIVES[config.objective.name]).parameters.keys():
            options.pop(name, None)
    return make_objective(config.objective.name, **options)


def _data(config: Config, tokenizer):
    """Training prompts, offline groups and held-out prompts, all read and checked before training."""
    data = config.data
    options = {"tokenizer": tokenizer, "template": data.template, "max_prompt_tokens": data.max_prompt_tokens}

    def prompts(source, key):
        if isinstance(source, Mapping):
            try:
                source = instantiate(source, _convert_="all")
            except Exception as error:  # Hydra wraps what the target raises
                cause = " ".join(str(error.__cause__ or error).split())
                raise ValueError(f"{key}: _target_={source.get('_target_')} failed: {cause}") from error
        loaded = load_prompts(source, key=key, **options)
        if loaded.truncated:
            some = "the first " if loaded.tokenised < len(loaded.prompts) else ""
            cut = f"{loaded.truncated} of {some}{loaded.tokenised} prompts were cut"
            print(f"{key}: {cut} to {data.max_prompt_tokens} tokens")
        return loaded.prompts

    held_out = [] if data.validation is None else prompts(data.validation, "data.validation")
    train, offline = [], []
    if data.rollouts is not None:
        offline = read_rollouts(
            data.rollouts, max_new_tokens=config.rollout.max_new_tokens, key="data.rollouts", **options
        )
    else:
        train = prompts(data.train, "data.train")
        if data.validation is None and data.holdout:
            holdout = int(data.holdout) if data.holdout >= 1 else data.holdout
            train, held_out = train.split(holdout, config.seed)
    return train, offline, held_out[: config.validation.max_prompts]
