"""The configuration of reward-model training: what ``conf/reward_model.yaml`` explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig

from nemo_brain.config.checks import check_common
from nemo_brain.config.common import (
    EpochConfig,
    EpochDataConfig,
    EpochTrainerConfig,
    GroupTrainConfig,
    ModelConfig,
)
from nemo_brain.config.schema import key, parse
from nemo_brain.data.preferences import FORKS


@dataclass
class RewardModelConfig(ModelConfig):
    restore_from: str | None = key(
        None,
        "the trunk: a Hugging Face directory, a .gguf file, or package:NAME (the GGUF file in an installed package); "
        "the directory of a reward model brings its head; null: from scratch by model.gpt",
    )
    frozen_layers: int = key(0, "the embeddings and this many first layers are not trained, if above 0", at_least=0)
    head_std: float = key(0.0, "of a new head's normal weights; 0: all rewards start at zero", at_least=0)


@dataclass
class RewardTrainConfig(GroupTrainConfig):
    centering: float = key(
        0.0,
        "coefficient of (r_chosen + r_rejected)^2 in the loss, which draws rewards towards zero",
        at_least=0,
    )
    subtract_mean: bool = key(True, "the exported model's rewards have mean zero on the held-out outputs")


@dataclass
class RewardDataConfig(EpochDataConfig):
    forks: str = key(
        "refuse",
        "transcripts and messages that part before the last answer, or go on behind it",
        among=dict(zip(FORKS, ("", "the pair is the two answers with which they part"), strict=True)),
    )
    train: Any = key(
        MISSING, "JSONL (.gz: compressed) of chosen and rejected, with or without prompt; or a list of files"
    )


@dataclass
class RewardConfig(EpochConfig):
    trainer: EpochTrainerConfig = key(EpochTrainerConfig, "the reward head is computed in fp32 whatever the precision")
    model: RewardModelConfig = key(RewardModelConfig)
    train: RewardTrainConfig = key(RewardTrainConfig)
    data: RewardDataConfig = key(RewardDataConfig)


def check_reward_config(cfg: DictConfig) -> RewardConfig:
    """Validates a configuration.

    Raises:
        ValueError: names the key, what is wrong with it, and the remedy.
    """
    config = parse(RewardConfig, cfg, "conf/reward_model.yaml")
    check_common(config)
    model, train, data = config.model, config.train, config.data
    if model.frozen_layers and model.peft is not None:
        raise ValueError("model.frozen_layers must be 0 with model.peft: all layers are frozen, and all have adapters")
    if train.subtract_mean and data.validation is None and not data.holdout:
        raise ValueError(
            "train.subtract_mean subtracts the mean reward of held-out outputs, and there are none: set "
            "data.validation or data.holdout, or train.subtract_mean=false"
        )
    return config
