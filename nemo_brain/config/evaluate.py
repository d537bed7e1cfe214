"""The configuration of an evaluation: what ``conf/evaluate.yaml`` explains."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig

from nemo_brain.config.brain import ValidationConfig
from nemo_brain.config.checks import check_patience, check_patience_of_rewards, check_split, given_arguments
from nemo_brain.config.common import ModelConfig, OutputsConfig, RanksConfig, SplitModelConfig
from nemo_brain.config.schema import key, parse


@dataclass
class StartModelConfig(SplitModelConfig):
    restore_from: str = key(
        MISSING,
        "the start model, which the others are compared with: a Hugging Face directory, a .gguf file, package:NAME "
        "(the GGUF file in an installed package), or a run's directory or checkpoint",
    )

    @property
    def complete(self) -> ModelConfig:
        return ModelConfig(**{item.name: getattr(self, item.name) for item in dataclasses.fields(self)})


@dataclass
class EvaluationRolloutConfig(OutputsConfig):
    temperature: float = key(1.0, "of all models; the KL is known at 1 alone", above=0)
    rows_in_flight: int = key(256, "outputs sampled at a time by each data-parallel rank", at_least=1)
    micro_batch_tokens: int = key(
        4096, "row positions scored at a time; of new prompts in one pass of sampling", at_least=1
    )


@dataclass
class EvaluationDataConfig:
    validation: Any = key(MISSING, "the prompts: a path, a list of paths, or _target_: a callable that returns records")
    max_prompt_tokens: int = key(MISSING, "longer prompts lose tokens on the left", at_least=1)
    template: str | None = key(None, "null (text as it is) | chat | a format string with {prompt}")


@dataclass
class JudgeConfig:
    """A model that says which of two outputs is better; ``judge=null``: none."""

    url: str = key(MISSING, "http://HOST:PORT of an OpenAI-compatible server, without /v1")
    model: str = key(MISSING, "the judge's name there")
    against: str = key(
        "start", among={"start": "the start model's outputs", "reference": "the prompts' reference answers"}
    )
    prompt: str | None = key(
        None,
        "a text file with {prompt}, {first} and {second}, whose answers end in [[A]], [[B]] or [[C]] (tie); null: ours",
    )
    max_tokens: int = key(512, "of an answer", at_least=1)
    cache: str | None = key(None, "a file of answers that are not asked for again; null: run_dir/judgements.jsonl")
    api_key_env: str | None = key(None, "the environment variable with the key that is sent; null: no key")
    concurrency: int = key(8, "requests at a time", at_least=1)
    request_timeout_seconds: float = key(120.0, "of one attempt", above=0)
    timeout_seconds: float = key(
        600.0, "of a request with its repetitions; less than trainer.hang_timeout_minutes", above=0
    )


@dataclass
class EvaluationConfig:
    run_dir: str = key(MISSING, "metrics, samples, report; what an earlier run left there is moved aside")
    seed: int = key(
        0,
        "of the draws, which are the same for all models; a training with this seed validates with them",
        at_least=0,
        below=2**32,
    )
    candidates: list[str] = key(MISSING, "models of the start model's architecture and tokenizer, named as it is")
    trainer: RanksConfig = key(RanksConfig)
    model: StartModelConfig = key(StartModelConfig)
    rollout: EvaluationRolloutConfig = key(EvaluationRolloutConfig)
    reward: dict[str, Any] | None = key(None, "as in a training; null arguments are left out")
    gold: dict[str, Any] | None = key(
        None, "null | more judges of the same outputs, named, each as reward: {rouge: {_target_: ..., function: ...}}"
    )
    judge: JudgeConfig | None = key(None, "null | an LLM that compares outputs, see docs/evaluation.md")
    data: EvaluationDataConfig = key(EvaluationDataConfig)
    validation: ValidationConfig = key(ValidationConfig)

    @property
    def lengths(self) -> dict[str, int]:
        return {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "rollout.max_new_tokens": self.rollout.max_new_tokens,
        }


def check_evaluation(cfg: DictConfig) -> EvaluationConfig:
    """Validates a configuration; ValueError names the key, what is wrong with it and the remedy."""
    config = parse(EvaluationConfig, cfg, "conf/evaluate.yaml")
    config.reward = given_arguments(config.reward)
    if not config.candidates:
        raise ValueError("candidates is empty: name at least one model to compare with model.restore_from")
    check_split(config.trainer, config.model.complete)
    check_patience_of_rewards("reward", config.reward, config.trainer)
    config.gold = dict(config.gold or {})
    for name, section in config.gold.items():
        if not isinstance(section, dict) or not re.fullmatch(r"\w+", str(name)):
            raise ValueError(f"gold.{name} must be a section like reward, under a name of letters, digits and _")
        config.gold[name] = given_arguments(section)
        check_patience_of_rewards(f"gold.{name}", section, config.trainer)
    if config.judge is not None:
        if not re.fullmatch(r"https?://[^/\s?#@]+[^\s?#@]*", config.judge.url):
            raise ValueError(f"judge.url must be an address like http://HOST:PORT, not {config.judge.url!r}")
        check_patience("judge.timeout_seconds", config.judge.timeout_seconds, config.trainer)
    return config
