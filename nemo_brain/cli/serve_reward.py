"""``nemo-brain serve-reward``: a reward over HTTP."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from nemo_brain.cli.training import configurations


@hydra.main(version_base="1.3", config_path=str(configurations()), config_name="serve_reward")
def _serve(cfg: DictConfig) -> None:
    from nemo_brain.rewards.server import serve

    try:
        serve(cfg)
    except ValueError as error:
        # Ours name the key and the remedy, and need no traceback. Those of libraries keep theirs.
        *_, last = traceback.walk_tb(error.__traceback__)
        if not last[0].f_globals["__name__"].startswith("nemo_brain."):
            raise
        sys.exit(f"error: {error}")


def main(arguments: Sequence[str]) -> None:
    try:
        _serve()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before it served", file=sys.stderr)
        sys.exit(130)
