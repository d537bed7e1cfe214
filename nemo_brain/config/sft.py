"""The configuration of supervised fine-tuning: what ``conf/sft.yaml`` explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig

from nemo_brain.config.checks import check_common
from nemo_brain.config.common import EpochConfig, EpochDataConfig
from nemo_brain.config.schema import key, parse
from nemo_brain.data.demonstrations import TURNS


@dataclass
class SFTDataConfig(EpochDataConfig):
    train: Any = key(MISSING, "JSONL (.gz: compressed) of prompt and completion, or of messages; or a list of files")
    assistant_turns: str = key(
        "all",
        "of a conversation the assistant's messages that are learned",
        among=dict.fromkeys(TURNS, ""),
    )


@dataclass
class SFTConfig(EpochConfig):
    data: SFTDataConfig = key(SFTDataConfig)


def check_sft_config(cfg: DictConfig) -> SFTConfig:
    """Validates a configuration.

    Raises:
        ValueError: names the key, what is wrong with it, and the remedy.
    """
    config = parse(SFTConfig, cfg, "conf/sft.yaml")
    check_common(config)
    return config
