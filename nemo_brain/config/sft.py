"""The configuration of supervised fine-tuning: what ``conf/sft.yaml`` explains, with types and checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING, DictConfig

from nemo_brain.config.brain import (
    EpochConfig,
    EpochDataConfig,
    ModelConfig,
    among,
    at_least,
    check_common,
    typed,
)
from nemo_brain.data.demonstrations import TURNS


@dataclass
class SFTTrainConfig:
    global_batch_size: int = MISSING
    micro_batch_tokens: int = 4096


@dataclass
class SFTDataConfig(EpochDataConfig):
    assistant_turns: str = "all"


@dataclass
class SFTConfig(EpochConfig):
    model: ModelConfig = field(default_factory=ModelConfig)
    train: SFTTrainConfig = field(default_factory=SFTTrainConfig)
    data: SFTDataConfig = field(default_factory=SFTDataConfig)

    @property
    def layout(self) -> str:
        """A prompt has one completion, which shares it with no other: prompt and completion are one causal sequence."""
        return "separate_rows"


def check_sft_config(cfg: DictConfig) -> SFTConfig:
    """Validates a configuration.

    Raises:
        ValueError: names the key, what is wrong with it, and the remedy.
    """
    config: SFTConfig = typed(SFTConfig, cfg, "conf/sft.yaml")
    check_common(config)
    at_least(1, {"trainer.epochs": config.trainer.epochs})
    at_least(2, {"data.max_output_tokens": config.data.max_output_tokens})
    among("data.assistant_turns", config.data.assistant_turns, TURNS)
    return config
