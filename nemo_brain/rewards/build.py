"""Makes the reward that a configuration names."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from hydra.utils import get_object, instantiate

from nemo_brain.rewards.protocol import CollectiveReward, Reward


def make_reward(cfg: Mapping | None) -> Reward | CollectiveReward:
    """Instantiates the ``reward`` section: ``_target_`` and its arguments.

    Raises:
        ValueError: there is no ``_target_``, or it cannot be made, or what it makes is not callable.
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
    if not callable(reward) and not getattr(reward, "collective", False):
        raise ValueError(f"reward._target_={target} makes a {type(reward).__name__}, which is not callable ({remedy})")
    return reward
