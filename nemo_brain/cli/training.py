"""The commands that train models or compare them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from nemo_brain.core import signals


def brain(arguments: Sequence[str]) -> None:
    _prepare()
    from nemo_brain.training.brain.run import run
    from nemo_brain.training.entry import launch

    launch(configurations(), "brain", run)


def sft(arguments: Sequence[str]) -> None:
    _prepare()
    from nemo_brain.training.entry import launch
    from nemo_brain.training.sft.run import fine_tune

    launch(configurations(), "sft", fine_tune)


def reward_model(arguments: Sequence[str]) -> None:
    _prepare()
    from nemo_brain.training.entry import launch
    from nemo_brain.training.reward_model.run import train_reward_model

    launch(configurations(), "reward_model", train_reward_model)


def evaluate(arguments: Sequence[str]) -> None:
    _prepare()
    from nemo_brain.training.brain.evaluation import evaluate_models
    from nemo_brain.training.entry import launch

    launch(configurations(), "evaluate", evaluate_models)


def configurations() -> Path:
    """The directory of the YAML files: ``conf/`` of a checkout, of which an installed package has a copy."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _prepare() -> None:
    """Before the imports, which take long."""
    signals.listen()
    gc.disable()  # while objects come by the hundred thousand, to stay; launch enables it again
    from nemo_brain.host import cpu

    cpu.enable()
