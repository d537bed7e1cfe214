"""Puts a training of a reward model together from its configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from nemo_brain.build import (
    make_gpt_config,
    make_lora,
    make_optimizer,
    make_strategy,
    make_trainer,
    make_weights,
    quiet,
    world_size,
)
from nemo_brain.convert.export import check_target, make_export
from nemo_brain.convert.reward import RewardWeights, is_reward_model, new_head, open_reward_model
from nemo_brain.data.preferences import Preference, load_preferences, split_preferences
from nemo_brain.metrics import prepare_run_dir
from nemo_brain.reward_config import RewardConfig, check_reward_config
from nemo_brain.reward_model import RewardGPTConfig, RewardModel
from nemo_brain.reward_training import PreferenceLoop, PreferenceStrategy


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
    world_size(config)
    weights = _reward_weights(config)
    gpt = make_gpt_config(config, weights, RewardGPTConfig, "data.max_output_tokens")
    if config.model.frozen_layers > gpt.num_layers:
        raise ValueError(f"model.frozen_layers is {config.model.frozen_layers}, the model has {gpt.num_layers} layers")
    if config.model.export_to is not None:
        make_export(gpt, weights.vocab_size, weights.tokenizer, "model.export_to")
        check_target(config.model.export_to, "model.export_to")
    optim = make_optimizer(config)
    pairs, held_out = _pairs(config, weights)
    rank_zero = int(os.environ.get("RANK", 0)) == 0
    run_dir = Path(config.run_dir)
    if rank_zero:
        prepare_run_dir(run_dir)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    loop = PreferenceLoop(config, pairs, held_out, run_dir)
    model = RewardModel(gpt, weights, config.model.frozen_layers, make_lora(config), optim)
    strategy = make_strategy(config, PreferenceStrategy, centering=config.train.centering)
    trainer = make_trainer(config, strategy, config.trainer.epochs * loop.steps_per_epoch, [loop, *callbacks])
    trainer.fit(model, train_dataloaders=loop)
    if rank_zero:
        print("\n".join(loop.summary))
    return model


def _reward_weights(config: RewardConfig) -> RewardWeights:
    """A reward model to go on with, or a language model with a new head."""
    model = config.model
    if model.restore_from is not None and not model.gpt and is_reward_model(model.restore_from):
        return open_reward_model(model.restore_from, "model.restore_from")
    return new_head(make_weights(config), model.head_std, config.seed)


def _pairs(config: RewardConfig, weights: RewardWeights) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out pairs, all read and checked before training."""
    data = config.data

    def load(source, key: str) -> list[Preference]:
        loaded = load_preferences(
            source,
            tokenizer=weights.tokenizer,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_output_tokens=data.max_output_tokens,
            key=key,
        )
        if loaded.cut_prompts or loaded.cut_outputs:
            prompts = f"{loaded.cut_prompts} prompts cut to {data.max_prompt_tokens} tokens"
            outputs = f"{loaded.cut_outputs} outputs cut to {data.max_output_tokens}"
            print(f"{key}: of {len(loaded.pairs)} pairs {prompts}, {outputs}")
        return loaded.pairs

    train = load(data.train, "data.train")
    if data.validation is not None:
        return train, load(data.validation, "data.validation")
    if not data.holdout:
        return train, []
    return split_preferences(train, int(data.holdout) if data.holdout >= 1 else data.holdout, config.seed)
