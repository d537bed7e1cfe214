"""Makes the reward that a configuration names."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import overload

from hydra.utils import get_object, instantiate

from nemo_brain.rewards.protocol import CollectiveReward, Reward


@overload
def make_reward(cfg: Mapping | None, alone: None = None) -> Reward | CollectiveReward: ...


@overload
def make_reward(cfg: Mapping | None, alone: str) -> Reward: ...


def make_reward(cfg: Mapping | None, alone: str | None = None) -> Reward | CollectiveReward:
    """Instantiates the ``reward`` section: ``_target_`` and its arguments.

    Args:
        alone: who calls the reward on one rank, where a ``CollectiveReward`` cannot be called; None: nobody does.

    Raises:
        ValueError: there is no ``_target_``, or it cannot be made, or what it makes cannot be called.
    """
    remedy = "for a function of your own: _target_=nemo_brain.rewards.function.FunctionReward and function=file.py:name"
    target = (cfg or {}).get("_target_")
    if not target:
        raise ValueError(f"reward._target_ is missing (name a reward class; {remedy})")
    parts = False
    with contextlib.suppress(Exception):  # instantiate finds it out again, and says so
        parts = getattr(get_object(target), "makes_parts", False)
    try:
        reward = instantiate(cfg, _convert_="all", _recursive_=not parts)
    except Exception as error:  # Hydra wraps what the target raises
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"reward._target_={target} cannot be made: {cause} ({remedy})") from error
    collective = getattr(reward, "collective", False)
    if collective and alone is not None:
        raise ValueError(
            f"reward._target_={target} is computed by all ranks of a run together, and {alone} calls a reward on one: "
            "make it the run's whole reward, or give a reward model's directory to "
            "nemo_brain.rewards.huggingface.HuggingFaceReward"
        )
    if not callable(reward) and not collective:
        raise ValueError(f"reward._target_={target} makes a {type(reward).__name__}, which is not callable ({remedy})")
    return reward
