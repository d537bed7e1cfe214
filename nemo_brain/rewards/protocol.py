"""What a reward is, and the one place that calls it and checks what it returns."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nemo_brain.core.groups import Group, Prompt, RewardedGroup, SampledGroup, rewarded
from nemo_brain.core.heartbeat import heartbeat

SHOWN = 200  # characters of a prompt or an output in an error


class Reward(Protocol):
    """Scores a batch of outputs; higher is better. One finite number per output, in their order.

    ``prompts`` are what the tokenizer saw (the template applied); ``references`` and ``metadata`` are the prompts' own.
    Where a template was applied, ``metadata["messages"]`` is what it was applied to: see ``messages_of``.
    A reward with the attribute ``rescorable = True``, like every plain function, may be called again on a part of a
    batch that it failed on, to find the output that caused it; one that knows the output raises ``OutputError``. One
    with ``name`` is called so in errors. One with a method ``load`` is told so, in the processes that will call it,
    before the first call: what is heavy belongs there. One with a method ``check(reference, metadata)`` is asked about
    prompts before a run begins, and raises ValueError for one that it cannot score outputs to. One that consists of
    others and has ``skip_nonfinite`` finds there whether to hand on their NaN and infinities rather than to fail.
    """

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> Sequence[float]: ...


class RewardError(ValueError):
    """A reward has failed; the message names it and says all. ``index``: the output of the batch, where it is known."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index


class OutputError(Exception):
    """For rewards to raise when they know which output of the batch they failed on."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


def load_reward(reward: Reward) -> None:
    """Has the reward load what it needs, if it needs anything. ValueError: it cannot."""
    load = getattr(reward, "load", None)
    if load is None:
        return
    try:
        load()
    except Exception as error:
        raise RewardError(f"{_name(reward)} cannot be loaded: {type(error).__name__}: {error}") from error


def check_prompts(reward: Reward | CollectiveReward, prompts: Iterable[Prompt]) -> None:
    """Asks the reward about prompts, if it can be asked. ValueError: names the first one that it refuses, and why."""
    check = getattr(reward, "check", None)
    if check is None:
        return
    for prompt in prompts:
        try:
            check(prompt.reference, prompt.metadata)
        except ValueError as error:
            raise ValueError(f"{_name(reward)} cannot score outputs to the prompt {prompt.id!r}: {error}") from error


def messages_of(prompt: str, metadata: dict) -> list[dict[str, str]]:
    """The messages of a prompt, as its record had them: a plain prompt is one message of the user."""
    return metadata.get("messages") or [{"role": "user", "content": prompt}]


class CollectiveReward(Protocol):
    """A reward that the policy's ranks compute together: it is a model split over them.

    All ranks of a model replica call it in step after sampling, where a ``Reward`` is called on one rank's thread while
    sampling goes on. It is told apart by the attribute ``collective = True``.
    """

    collective: bool

    def setup(self, strategy: Any) -> None:
        """Called once on every rank, when the policy's ``PackedStrategy`` has been set up."""

    def score(self, groups: Sequence[Group], alone: bool) -> list[list[float]]:
        """The rewards of every output, on each of the ranks that call it.

        Args:
            alone: the ranks of this model replica call it, with groups of their own; otherwise all ranks do, with the
                same groups.
        """


def score_groups_in_step(
    reward: CollectiveReward, groups: Sequence[SampledGroup], alone: bool, skip_nonfinite: bool = False
) -> list[RewardedGroup]:
    """The groups with rewards, by all ranks that call it; ``alone`` as in ``CollectiveReward``, ``skip_nonfinite`` as
    in ``compute_rewards``.

    Raises:
        ValueError: a reward is not a finite number; on each of the ranks.
    """
    texts = [output.text for group in groups for output in group.outputs]
    shown = ([group.prompt.text for group in groups for _ in group.outputs], texts)
    values = [value for row in reward.score(groups, alone) for value in row]
    name = _name(reward)
    return _rewarded(groups, [_number(value, name, shown, i, skip_nonfinite) for i, value in enumerate(values)])


def score_groups(reward: Reward, groups: Sequence[SampledGroup], skip_nonfinite: bool = False) -> list[RewardedGroup]:
    """The groups with rewards, by one call of the reward.

    Raises:
        ValueError: see ``compute_rewards``.
    """
    pairs = [(group.prompt, output) for group in groups for output in group.outputs]
    rewards = compute_rewards(
        reward,
        [prompt.text for prompt, _ in pairs],
        [output.text for _, output in pairs],
        references=[prompt.reference for prompt, _ in pairs],
        metadata=[prompt.metadata for prompt, _ in pairs],
        skip_nonfinite=skip_nonfinite,
    )
    return _rewarded(groups, rewards)


def _rewarded(groups: Sequence[SampledGroup], rewards: Sequence[float]) -> list[RewardedGroup]:
    """The groups with the rewards of all their outputs, one after another."""
    assert len(rewards) == sum(len(group.outputs) for group in groups)
    rest = iter(rewards)
    return [rewarded(group, [next(rest) for _ in group.outputs]) for group in groups]


def compute_rewards(
    reward: Reward,
    prompts: list[str],
    outputs: list[str],
    *,
    references: list[str | None],
    metadata: list[dict],
    skip_nonfinite: bool = False,
) -> list[float]:
    """The rewards of outputs, in one call. Python, NumPy and torch numbers are taken.

    Args:
        skip_nonfinite: NaN and infinities are handed on rather than refused.

    Raises:
        RewardError: the reward failed (its own error is the cause), or did not return one finite number per output. The
            message names the reward and shows the first prompt and output concerned.
    """
    if not outputs:
        return []
    batch = (prompts, outputs, references, metadata)
    name = _name(reward)
    if hasattr(reward, "skip_nonfinite"):
        reward.skip_nonfinite = skip_nonfinite
    try:
        result = _call(reward, batch, 0, len(outputs))
    except RewardError as error:  # of a reward that this one consists of
        raise RewardError(f"{name}: {error}", error.index) from error
    except Exception as error:
        place = _first_failure(reward, batch, error)
        where = f"a batch of {len(outputs)} from {_show(batch, 0)}" if place is None else _show(batch, place)
        problem = str(error) if isinstance(error, OutputError) else f"{type(error).__name__}: {error}"
        raise RewardError(f"{name} failed with {problem}, on {where}", place) from error
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"{name} returned a {type(result).__name__} (return a list of one number per output)")
    if len(values) != len(outputs):
        place = min(len(values), len(outputs) - 1)
        raise RewardError(
            f"{name} returned {len(values)} rewards for {len(outputs)} outputs (return one number per output); the "
            f"first without a partner is {_show(batch, place)}"
        )
    return [_number(value, name, batch, index, skip_nonfinite) for index, value in enumerate(values)]


def _call(reward: Reward, batch: tuple, start: int, end: int) -> Sequence[float]:
    prompts, outputs, references, metadata = (part[start:end] for part in batch)
    values = reward(prompts, outputs, references=references, metadata=metadata)
    heartbeat()
    return values


def _first_failure(reward: Reward, batch: tuple, error: Exception) -> int | None:
    """The first output that the reward fails on, by halving; None where that is not known."""
    if isinstance(error, OutputError):
        return error.index
    # A failed connection or file is no output's fault, and rewards that run on several ranks must be called in step.
    local = inspect.isfunction(reward) or getattr(reward, "rescorable", False)
    if isinstance(error, OSError) or not local:
        return None

    def fails(start: int, end: int) -> bool:
        try:
            _call(reward, batch, start, end)
        except Exception:
            return True
        return False

    start, end = 0, len(batch[0])
    while end - start > 1:
        middle = (start + end) // 2
        if fails(start, middle):
            end = middle
        elif fails(middle, end):
            start = middle
        else:
            return None
    return start


def _number(value: Any, name: str, batch: tuple, index: int, skip_nonfinite: bool) -> float:
    """A Python float, checked: finite, unless such are to be skipped."""
    # A NumPy or torch number has ``item``; one that is an array of several stays what it is, and is refused.
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):
        value = value.item()
    real = isinstance(value, numbers.Real)
    try:
        number = float(value) if real else math.nan
    except OverflowError:
        number = math.inf
    if math.isfinite(number) or (real and skip_nonfinite):
        return number
    skip = ", or leave such outputs out with train.on_nonfinite=skip" if real else ""
    shown = f"{_shorten(repr(value))} for {_show(batch, index)}"
    raise RewardError(f"{name} returned {shown} (return one finite number per output{skip})", index)


def _name(reward: Reward | CollectiveReward) -> str:
    own = getattr(reward, "name", None) or getattr(reward, "__qualname__", None) or type(reward).__qualname__
    return f"the reward {own}"


def _show(batch: tuple, index: int) -> str:
    prompts, outputs = batch[:2]
    return f"output {index}: {_shorten(repr(outputs[index]))} to the prompt {_shorten(repr(prompts[index]))}"


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
