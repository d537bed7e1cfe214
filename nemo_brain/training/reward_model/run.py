"""Puts a training of a reward model together from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from omegaconf import DictConfig

from nemo_brain.config.reward_model import RewardConfig, RewardModelConfig, check_reward_config
from nemo_brain.convert.export import export_model
from nemo_brain.convert.reward import RewardExport, RewardWeights, is_reward_model, new_head, open_reward_model
from nemo_brain.data.examples import checksum, read_examples
from nemo_brain.data.preferences import load_preferences
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.training.build import make_ddp, make_optimizer, make_strategy
from nemo_brain.training.epochs import EpochState, steps_per_epoch
from nemo_brain.training.model import export_for, make_gpt_config, make_lora, make_weights, model_stop
from nemo_brain.training.reward_model.nemo_model import RewardModel
from nemo_brain.training.reward_model.training import PreferenceLoop, PreferenceStrategy
from nemo_brain.training.run import Parts, train


def train_reward_model(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> RewardModel:
    """Trains as the configuration says and leaves the results in its ``run_dir`` and ``model.export_to``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
        Interrupted: on every rank, when the run was asked to end early; it has been saved.
    """
    config = check_reward_config(cfg)
    return train("reward_model", cfg, config, lambda: _parts(config), callbacks)


def _parts(config: RewardConfig) -> Parts[RewardModel, EpochState]:
    model, state = config.model, EpochState()
    weights = _reward_weights(model, config.seed)
    gpt = make_gpt_config(model, config.trainer, weights, config.lengths, RewardGPTConfig)
    if model.frozen_layers > gpt.num_layers:
        raise ValueError(f"model.frozen_layers is {model.frozen_layers}, the model has {gpt.num_layers} layers")
    stop = model_stop(weights, config.data.template)
    export = export_for("model.export_to", model.export_to, gpt, weights, stop.token_ids)
    optim = make_optimizer(config.optim, config.trainer)
    load = partial(load_preferences, forks=config.data.forks)
    pairs, held_out = read_examples(config.data, config.seed, weights.tokenizer, stop, load)
    strategy = make_strategy(
        PreferenceStrategy,
        model,
        config.trainer,
        config.train,
        config.checkpoint,
        make_ddp(config.ddp, config.optim),
        config.seed,
        centering=config.train.centering,
    )

    def at_end() -> None:
        if export is not None:
            strategy.wait_for_param_gather()
            evaluated = state.evaluation if config.train.subtract_mean else None
            mean = evaluated["eval/reward"] if evaluated is not None else 0.0
            export_model(strategy.chunks, RewardExport(export, mean, config.data.template), str(model.export_to))

    return Parts(
        RewardModel(gpt, weights, model.frozen_layers, make_lora(model.peft, config.seed), optim),
        strategy,
        state,
        steps=config.trainer.epochs * steps_per_epoch(pairs, config.train.global_batch_size),
        data={"pairs": checksum(pairs), "held-out pairs": checksum(held_out)},
        loop=lambda frame: PreferenceLoop(config, frame, strategy, pairs, held_out),
        at_end=at_end,
    )


def _reward_weights(model: RewardModelConfig, seed: int) -> RewardWeights:
    """A reward model to go on with, or a language model with a new head."""
    if model.restore_from is not None and not model.gpt and is_reward_model(model.restore_from):
        return open_reward_model(model.restore_from, "model.restore_from", model.allow_nonfinite)
    return new_head(make_weights(model, seed), model.head_std, seed)
