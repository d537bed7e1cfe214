"""What the commands that train share: Hydra's command line around a training, and how it ends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

from nemo.core.config import hydra_runner
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from nemo_brain.core.errors import is_ours
from nemo_brain.core.interruption import Interrupted
from nemo_brain.core.signals import EXIT_CODE


def launch(configurations: Path, name: str, train: Callable[[DictConfig], object]) -> None:
    """Composes the configuration and trains. torchrun, where it started the process, learns of the error that ended it.

    Args:
        configurations: the directory of the YAML files.
        name: the one taken unless the command line says ``--config-name``.
        train: is given the composed configuration.
    """

    @record
    def task(cfg: DictConfig) -> None:
        try:
            train(cfg)
        except Interrupted as reason:
            goes_on = "the same command goes on from the last checkpoint, or starts anew before the first step"
            print(f"stopped: {reason}; {goes_on}", file=sys.stderr)
            sys.exit(EXIT_CODE)
        except ValueError as error:
            if not is_ours(error):
                raise
            get_error_handler().record_exception(error)
            sys.exit(f"error: {error}")

    gc.freeze()  # what has been imported stays: no collection need look at it again
    gc.enable()
    hydra_runner(config_path=str(configurations), config_name=name)(task)()
