"""Keys that go together, in the sections that all kinds of training share."""

from __future__ import annotations

import re
from typing import Any

from nemo_brain.config.common import PEFT_TARGETS, ModelConfig, PeftConfig, RanksConfig, TrainingConfig


def given_arguments(reward: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without those that are null: a config that names another reward than the one it inherits from sets the other's
    arguments to null."""
    return None if reward is None else {name: value for name, value in reward.items() if value is not None}


def check_common(config: TrainingConfig) -> None:
    """ValueError for keys of the common sections that do not go together."""
    holdout = config.data.holdout
    if holdout > 1 and holdout % 1 != 0:
        raise ValueError(f"data.holdout must be a fraction below 1 or a number of prompts, not {holdout}")
    if config.model.push_to is not None:
        _check_push(config.model.push_to, config.model.export_to)
    check_split(config.trainer, config.model)
    if config.model.peft is not None:
        _check_peft(config.model.peft, config.model.tensor_model_parallel_size)


def _check_push(repository: str, export_to: str | None) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"model.push_to must be organisation/name, not {repository!r}")
    if export_to is None:
        raise ValueError("model.push_to needs model.export_to: the export is what is pushed")


def check_split(trainer: RanksConfig, model: ModelConfig) -> None:
    """ValueError for keys of how a model is split and computed that do not go together."""
    if trainer.fp8 is not None and not trainer.bf16:
        raise ValueError("trainer.fp8 needs trainer.precision=bf16-mixed: what is not FP8 is bf16")
    if model.context_parallel_size != 1:
        raise ValueError(
            "model.context_parallel_size must be 1: groups are packed rows, which context parallelism does not split; "
            "use tensor and sequence parallelism for long rows"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ValueError("model.sequence_parallel needs model.tensor_model_parallel_size above 1")
    if model.virtual_pipeline_model_parallel_size is not None and model.pipeline_model_parallel_size == 1:
        raise ValueError("model.virtual_pipeline_model_parallel_size needs model.pipeline_model_parallel_size above 1")


def _check_peft(peft: PeftConfig, tensor_parallel: int) -> None:
    if peft.dim % tensor_parallel:
        raise ValueError(
            f"model.peft.dim ({peft.dim}) must be a multiple of model.tensor_model_parallel_size ({tensor_parallel}): "
            "an adapter's rows are divided over the ranks"
        )
    if peft.dropout != 0:
        raise ValueError("model.peft.dropout must be 0: with dropout the policy is not the law that was sampled from")
    targets = peft.target_modules
    if not targets:
        raise ValueError(f"model.peft.target_modules is empty: name some of {', '.join(PEFT_TARGETS)}")
    if len(set(targets)) < len(targets):
        raise ValueError(f"model.peft.target_modules names a module twice: {', '.join(targets)}")


def check_patience_of_rewards(name: str, section: Any, trainer: RanksConfig) -> None:
    """``check_patience`` of a reward's ``timeout_seconds``, and of those of its parts."""
    items = section.items() if isinstance(section, dict) else enumerate(section) if isinstance(section, list) else ()
    for part, value in items:
        if part == "timeout_seconds" and isinstance(value, (int, float)):
            check_patience(f"{name}.{part}", value, trainer)
        check_patience_of_rewards(f"{name}.{part}", value, trainer)


def check_patience(name: str, seconds: float, trainer: RanksConfig) -> None:
    """ValueError where one rank may wait for a server longer than the others wait for that rank."""
    if seconds >= 60 * trainer.hang_timeout_minutes:
        raise ValueError(
            f"{name} ({seconds:g}) must be less than trainer.hang_timeout_minutes "
            f"({trainer.hang_timeout_minutes:g}), after which the other ranks take the run for one that hangs: lower "
            "it, or raise the minutes"
        )
