"""The configuration of a calibration: what ``conf/calibrate.yaml`` explains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig

from nemo_brain.config.checks import given_arguments
from nemo_brain.config.schema import key, parse
from nemo_brain.data.preferences import FORKS


@dataclass
class PreferenceDataConfig:
    preferences: Any = key(
        MISSING,
        "JSONL (.gz: compressed) of chosen and rejected, with or without prompt; a list of files, or _target_: a "
        "callable that returns records",
    )
    forks: str = key(
        "refuse",
        "transcripts and messages that part before the last answer, or go on behind it",
        among=dict(zip(FORKS, ("", "the pair is the two answers with which they part"), strict=True)),
    )
    template: str | None = key(
        None,
        "as in the training: null (text as it is) | chat (the reward gets messages; as the prompt's text, what they "
        "say) | a format string with {prompt}",
    )


@dataclass
class CalibrationConfig:
    out: str = key(
        "runs/calibrated/sigmoid.yaml", "the keys for a training, which --config-dir runs +calibrated=sigmoid reads"
    )
    seed: int = key(0, "of the pairs that are drawn for the intervals", at_least=0)
    batch_size: int = key(64, "outputs that the reward is given at a time", at_least=1)
    reward: dict[str, Any] | None = key(None, "as in a training; null arguments are left out")
    data: PreferenceDataConfig = key(PreferenceDataConfig)


def check_calibration(cfg: DictConfig) -> CalibrationConfig:
    """Validates a configuration; ValueError names the key, what is wrong with it and the remedy."""
    config = parse(CalibrationConfig, cfg, "conf/calibrate.yaml")
    config.reward = given_arguments(config.reward)
    out = Path(config.out)
    if out.suffix != ".yaml" or not out.parent.name:
        raise ValueError(f"out must be a .yaml file in a directory, DIRECTORY/GROUP/NAME.yaml, not {config.out}")
    return config
