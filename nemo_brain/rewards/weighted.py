"""A weighted sum of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import RewardError, compute_rewards, load_reward


class WeightedReward:
    """The sum of ``weight`` x reward.

    Args:
        rewards: a list of ``{weight: ..., _target_: ..., arguments}``.

    Raises:
        ValueError: naming the part, what is wrong with it and the remedy.
    """

    name = "WeightedReward"
    makes_parts = True  # so Hydra is not to make them first

    def __init__(self, rewards: Sequence[Mapping]):
        if not isinstance(rewards, Sequence) or isinstance(rewards, str) or not rewards:
            raise ValueError("reward.rewards must be a list of {weight: ..., _target_: ..., arguments}")
        self._parts = []
        self.skip_nonfinite = False
        for index, section in enumerate(rewards):
            place = f"reward.rewards[{index}]"
            if not isinstance(section, Mapping):
                raise ValueError(f"{place} must be {{weight: ..., _target_: ..., arguments}}, not {section!r}")
            arguments = dict(section)
            weight = arguments.pop("weight", None)
            if type(weight) not in (int, float) or not math.isfinite(weight):
                raise ValueError(f"{place}.weight must be a finite number, not {weight!r}")
            try:
                reward = make_reward(arguments, alone=self.name)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            self._parts.append((place, weight, reward))

    def load(self) -> None:
        for place, _, reward in self._parts:
            try:
                load_reward(reward)
            except RewardError as error:
                raise ValueError(f"{place}: {error}") from error

    def check(self, reference: str | None, metadata: dict) -> None:
        for place, _, reward in self._parts:
            if check := getattr(reward, "check", None):
                try:
                    check(reference, metadata)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> list[float]:
        total = [0.0] * len(outputs)
        for place, weight, reward in self._parts:
            try:
                values = compute_rewards(
                    reward,
                    prompts,
                    outputs,
                    references=references,
                    metadata=metadata,
                    skip_nonfinite=self.skip_nonfinite,
                )
            except RewardError as error:
                raise RewardError(f"{place}: {error}", error.index) from error
            total = [sum_ + weight * value for sum_, value in zip(total, values, strict=True)]
        return total
