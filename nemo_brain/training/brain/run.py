"""Puts a BRAIn run together from its configuration: model, objective, prompts, reward, loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerFast

from nemo_brain.config.brain import Config, DataConfig, check
from nemo_brain.convert.adapter import export_adapter
from nemo_brain.convert.export import export_model
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.data.prompts import load_prompts
from nemo_brain.data.rollouts import read_rollouts
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.objectives import OBJECTIVES, Objective, make_objective
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.megatron import MegatronReward
from nemo_brain.training.brain.loop import BRAInLoop
from nemo_brain.training.brain.nemo_model import BRAInGPTModel
from nemo_brain.training.brain.remote_rollout import RemoteRollout
from nemo_brain.training.brain.state import BRAInState
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import (
    export_for,
    make_ddp,
    make_gpt_config,
    make_lora,
    make_optimizer,
    make_strategy,
    make_weights,
)
from nemo_brain.training.run import Parts, train


def run(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> BRAInGPTModel:
    """Trains as the configuration says and leaves the results in its ``run_dir``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
        Interrupted: on every rank, when the run was asked to end early; it has been saved.
    """
    config = check(cfg)
    return train("brain", cfg, config, lambda: _parts(config), callbacks)


def _parts(config: Config) -> Parts[BRAInGPTModel, BRAInState]:
    objective = _objective(config)
    reward = make_reward(config.reward)
    weights = make_weights(config.model, config.seed)
    gpt = make_gpt_config(config.model, config.trainer, weights, config.lengths)
    if isinstance(reward, MegatronReward):
        reward_gpt = make_gpt_config(config.model, config.trainer, reward.weights, config.lengths, RewardGPTConfig)
        reward.configure(reward_gpt, weights.tokenizer, config.data.template)
    remote = RemoteRollout(config, gpt, weights) if config.rollout.remote is not None else None
    lora = make_lora(config.model.peft, config.seed)
    model = BRAInGPTModel(gpt, weights, objective, lora, make_optimizer(config.optim, config.trainer))
    strategy = make_strategy(
        BRAInStrategy,
        config.model,
        config.trainer,
        config.train,
        config.checkpoint,
        make_ddp(config.ddp, config.optim),
        config.seed,
        prior_placement=config.prior.placement,
    )
    prompts, offline, held_out = _data(config, weights.tokenizer)

    merged = export_for("model.export_to", config.model.export_to, gpt, weights)
    adapter = export_for("model.export_adapter_to", config.model.export_adapter_to, gpt, weights)

    def at_end() -> None:
        strategy.settle()
        if merged is not None:
            export_model(strategy.chunks, merged, config.model.export_to)
        if adapter is not None:
            directory = config.model.export_adapter_to
            export_adapter(strategy.chunks, adapter, lora, config.model.restore_from, directory)

    return Parts(
        model,
        strategy,
        BRAInState(),
        steps=config.trainer.max_iterations * config.steps_per_iteration,
        data={"prompts": len(prompts), "groups": len(offline), "held-out prompts": len(held_out)},
        loop=lambda frame: BRAInLoop(config, frame, strategy, objective, prompts, offline, held_out, reward, remote),
        at_end=at_end,
    )


def _data(
    config: Config, tokenizer: PreTrainedTokenizerFast
) -> tuple[Sequence[Prompt], Sequence[SampledGroup], Sequence[Prompt]]:
    """Training prompts, offline groups and held-out prompts, all read and checked before training."""
    data = config.data
    held_out: Sequence[Prompt] = []
    train: Sequence[Prompt] = []
    offline: Sequence[SampledGroup] = []
    if data.validation is not None:
        held_out = _prompts(data.validation, "data.validation", data, tokenizer)
    if data.rollouts is not None:
        offline = read_rollouts(
            data.rollouts,
            tokenizer=tokenizer,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            key="data.rollouts",
        )
    else:
        train = _prompts(data.train, "data.train", data, tokenizer)
        if data.validation is None and data.holdout:
            holdout = int(data.holdout) if data.holdout >= 1 else data.holdout
            train, held_out = train.split(holdout, config.seed)
    return train, offline, held_out[: config.validation.max_prompts]


def _prompts(source: Any, key: str, data: DataConfig, tokenizer: PreTrainedTokenizerFast):
    """The prompts of a file, of several, or of a target that Hydra makes."""
    if isinstance(source, Mapping):
        try:
            source = instantiate(source, _convert_="all")
        except Exception as error:  # Hydra wraps what the target raises
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{key}: _target_={source.get('_target_')} failed: {cause}") from error
    loaded = load_prompts(
        source, key=key, tokenizer=tokenizer, template=data.template, max_prompt_tokens=data.max_prompt_tokens
    )
    if loaded.truncated:
        some = "the first " if loaded.tokenised < len(loaded.prompts) else ""
        cut = f"{loaded.truncated} of {some}{loaded.tokenised} prompts were cut"
        print(f"{key}: {cut} to {data.max_prompt_tokens} tokens")
    return loaded.prompts


def _objective(config: Config) -> Objective:
    options = config.objective_options
    if config.objective.name in OBJECTIVES:
        # conf/brain.yaml sets these for brain: an objective without them is not to stumble over them.
        for name in {"gamma", "goodness"} - inspect.signature(OBJECTIVES[config.objective.name]).parameters.keys():
            options.pop(name, None)
    return make_objective(config.objective.name, **options)
