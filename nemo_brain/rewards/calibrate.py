"""``nemo-brain calibrate``: the gamma of a reward from preference pairs, as keys for a training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from nemo_brain.config.calibrate import CalibrationConfig, PreferenceDataConfig, check_calibration
from nemo_brain.data.conversations import Conversation
from nemo_brain.data.preferences import OWN, read_pairs
from nemo_brain.data.prompts import prompt_reference
from nemo_brain.data.records import Record, made_source
from nemo_brain.data.templates import KEY, FormatString
from nemo_brain.report.calibration import Calibration, calibrate
from nemo_brain.report.preferences import preference_metrics
from nemo_brain.report.progress import progress
from nemo_brain.report.text import nats, number, percent, with_interval
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import Reward, RewardError, compute_rewards, load_reward

_SIDES = ("chosen", "rejected")


def calibrate_reward(cfg: DictConfig) -> Calibration:
    """Fits gamma and centre of a reward, says what came of it and writes it to ``out``.

    Raises:
        ValueError: the configuration, the data or the reward is wrong, or no gamma fits; names the key or file:line.
    """
    config = check_calibration(cfg)
    reward = make_reward(config.reward, alone="a calibration")
    pairs = list(_read(config.data))
    load_reward(reward)
    rewards_P2 = _rewards(reward, pairs, config.batch_size)
    try:
        found = calibrate(rewards_P2, config.seed)
    except ValueError as error:
        raise ValueError(
            f"data.preferences, reward: {error}: no gamma fits (look at the reward's sign and template, and whether "
            "chosen and rejected are what they are called)"
        ) from None
    lines = _summary(rewards_P2, found)
    print("\n".join(lines))
    _write(config, found, lines)
    return found


@dataclass(frozen=True)
class _Pair:
    """A record's prompt as the reward gets it, and its two answers."""

    where: str
    prompt: str
    answers: list[str]
    reference: str | None
    metadata: dict[str, Any]


def _read(data: PreferenceDataConfig) -> Iterator[_Pair]:
    """The pairs of ``data.preferences``. ValueError: names ``path:line`` or the key."""
    chat = data.template == "chat"
    form = None if chat or data.template is None else FormatString(data.template, ("prompt",), KEY, "null, chat")
    source = made_source(data.preferences, "data.preferences")
    for record, prompt, answers in read_pairs(source, chat, data.forks, "data.preferences"):
        if isinstance(prompt, list) and not chat:
            raise record.error("messages need a chat template", f"set {KEY}=chat, or give a plain prompt")
        if answers[0] == answers[1]:
            raise record.error("chosen and rejected are the same", "remove the line")
        text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        text = text if form is None else form.fill({"prompt": text})
        metadata = _metadata(record, prompt, data.template is not None)
        yield _Pair(record.where, text, answers, prompt_reference(record), metadata)


def _metadata(record: Record, prompt: str | Conversation, templated: bool) -> dict[str, Any]:
    """As ``data.prompts.parse_prompt`` makes it."""
    metadata = {name: value for name, value in record.fields.items() if name not in (*OWN, "id", "reference")}
    if isinstance(prompt, list):
        metadata["messages"] = prompt
    elif templated:
        metadata["messages"] = [{"role": "user", "content": prompt}]
    return metadata


def _rewards(reward: Reward, pairs: list[_Pair], batch_size: int) -> np.ndarray:
    """[P, 2]: of the chosen and of the rejected answers. ValueError: the reward failed; names ``path:line``."""
    answers = [(pair, side) for pair in pairs for side in range(2)]
    values: list[float] = []
    with progress(len(answers), "rewards", "outputs") as bar:
        for start in range(0, len(answers), batch_size):
            batch = answers[start : start + batch_size]
            try:
                found = compute_rewards(
                    reward,
                    [pair.prompt for pair, _ in batch],
                    [pair.answers[side] for pair, side in batch],
                    references=[pair.reference for pair, _ in batch],
                    metadata=[pair.metadata for pair, _ in batch],
                    skip_nonfinite=True,
                )
            except RewardError as error:
                where = batch[error.index or 0][0].where
                raise ValueError(f"{where}: {error}") from error
            for (pair, side), value in zip(batch, found, strict=True):
                if not math.isfinite(value):
                    raise ValueError(
                        f"{pair.where}: the reward of the {_SIDES[side]} output is {value} (remove the line, or have "
                        "the reward return finite numbers)"
                    )
            values += found
            bar.update(len(batch))
    return np.array(values).reshape(-1, 2)


def _summary(rewards_P2: np.ndarray, found: Calibration) -> list[str]:
    """What came of it, for people; warns where it is to be doubted."""
    plain, fitted = preference_metrics(rewards_P2), preference_metrics(rewards_P2 / found.gamma)
    if found.separable:
        warnings.warn(
            "the reward prefers the chosen output of every pair, so that the likelihood rises as gamma falls to 0: "
            "written is the largest gamma within a 95% interval; more pairs, or harder ones, would say more",
            stacklevel=3,
        )
    if plain["eval/accuracy"] <= 0.5:
        warnings.warn(
            "the reward does not prefer the chosen outputs more often than a coin: a gamma says little of it",
            stacklevel=3,
        )
    return [
        f"pairs     {len(rewards_P2):,}",
        f"accuracy  {with_interval(plain, 'eval/accuracy', percent)}",
        f"log-loss  {nats(plain['eval/log_loss'])} nats with gamma = 1, {nats(fitted['eval/log_loss'])} with this one, "
        f"{nats(math.log(2))} of a coin",
        f"gamma     {number(found.gamma)} (95% CI {number(found.low)} to {number(found.high)})",
        f"centre    {number(found.center)}",
    ]


def _write(config: CalibrationConfig, found: Calibration, lines: list[str]) -> None:
    """A file that Hydra reads, and says how."""
    out = Path(config.out)
    keys = {"goodness": "sigmoid", "goodness_center": f"{found.center:.6g}", "gamma": f"{found.gamma:.6g}"}
    text = ["# @package _global_", *(f"# {line}" for line in lines), "objective:"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*text, *(f"  {name}: {value}" for name, value in keys.items())]) + "\n")
    overrides = " ".join(f"objective.{name}={value}" for name, value in keys.items())
    print(f"written   {out}: --config-dir {out.parent.parent} +{out.parent.name}={out.stem}, or {overrides}")
