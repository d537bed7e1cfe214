"""Puts a training of a reward model together from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from omegaconf import DictConfig

from nemo_brain.config.reward_model import RewardConfig, check_reward_config
from nemo_brain.convert.reward import RewardWeights, is_reward_model, new_head, open_reward_model
from nemo_brain.data.examples import read_examples
from nemo_brain.data.preferences import load_preferences
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.training.build import (
    check_export,
    make_ddp,
    make_gpt_config,
    make_lora,
    make_optimizer,
    make_strategy,
    make_weights,
    quiet,
    world_size,
)
from nemo_brain.training.epochs import train_epochs
from nemo_brain.training.reward_model.nemo_model import RewardModel
from nemo_brain.training.reward_model.training import PreferenceLoop, PreferenceStrategy


def train_reward_model(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> RewardModel:
    """Trains as the configuration says and leaves the results in its ``run_dir`` and ``model.export_to``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
    """
    quiet()
    config = check_reward_config(cfg)
    world_size(config.trainer, config.model)
    weights = _reward_weights(config)
    gpt = make_gpt_config(config.model, config.trainer, weights, config.lengths, RewardGPTConfig)
    if config.model.frozen_layers > gpt.num_layers:
        raise ValueError(f"model.frozen_layers is {config.model.frozen_layers}, the model has {gpt.num_layers} layers")
    check_export(config.model.export_to, gpt, weights)
    optim = make_optimizer(config.optim, config.trainer)
    pairs, held_out = read_examples(config.data, config.seed, weights.tokenizer, load_preferences)
    model = RewardModel(gpt, weights, config.model.frozen_layers, make_lora(config.model.peft, config.seed), optim)
    strategy = make_strategy(
        PreferenceStrategy,
        config.model,
        config.trainer,
        config.train,
        make_ddp(config.ddp, config.optim),
        config.seed,
        centering=config.train.centering,
    )
    train_epochs(cfg, model, strategy, PreferenceLoop(config, pairs, held_out), callbacks)
    return model


def _reward_weights(config: RewardConfig) -> RewardWeights:
    """A reward model to go on with, or a language model with a new head."""
    model = config.model
    if model.restore_from is not None and not model.gpt and is_reward_model(model.restore_from):
        return open_reward_model(model.restore_from, "model.restore_from")
    return new_head(make_weights(model, config.seed), model.head_std, config.seed)
