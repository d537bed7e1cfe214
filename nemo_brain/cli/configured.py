"""What the commands share that read a configuration, but train nothing: Hydra's command line, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from nemo_brain.cli.training import configurations
from nemo_brain.core.errors import is_ours


def run_configured(name: str, work: Callable[[DictConfig], object], stopped: str) -> None:
    """Composes the configuration ``name`` and works on it.

    Args:
        stopped: what is said after Ctrl-C.
    """

    @hydra.main(version_base="1.3", config_path=str(configurations()), config_name=name)
    def task(cfg: DictConfig) -> None:
        try:
            work(cfg)
        except ValueError as error:
            if not is_ours(error):
                raise
            sys.exit(f"error: {error}")

    try:
        task()
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C{stopped}", file=sys.stderr)
        sys.exit(130)
