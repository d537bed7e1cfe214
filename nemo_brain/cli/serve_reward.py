"""``nemo-brain serve-reward``: a reward over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from nemo_brain.cli.configured import run_configured


def _serve(cfg: DictConfig) -> None:
    from nemo_brain.rewards.server import serve

    serve(cfg)


def main(arguments: Sequence[str]) -> None:
    run_configured("serve_reward", _serve, " before it served")
