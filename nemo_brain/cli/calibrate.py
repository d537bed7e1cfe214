"""``nemo-brain calibrate``: the gamma of a reward, from preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from nemo_brain.cli.configured import run_configured


def _calibrate(cfg: DictConfig) -> None:
    from nemo_brain.rewards.calibrate import calibrate_reward

    calibrate_reward(cfg)


def main(arguments: Sequence[str]) -> None:
    run_configured("calibrate", _calibrate, ": nothing is written")
