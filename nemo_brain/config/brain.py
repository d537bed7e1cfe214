"""The configuration: its keys, their types and what they may be. ``check`` turns a Hydra config into a ``Config``.

Everything that can be wrong without looking at data or weights is refused here, before any heavy work.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nemo_brain.core.packing import LAYOUTS

# The linear layers of a transformer layer, by Megatron's names.
PEFT_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass
class CommonTrainerConfig:
    """The keys of ``trainer`` in every kind of training."""

    devices: int | None = None  # processes per node; null: what torchrun started, else 1
    num_nodes: int = 1
    accelerator: str = "auto"
    precision: str = "32"
    fp8: str | None = None
    fp8_recipe: str = "delayed"
    hang_timeout_minutes: float = 30.0
    log_every_steps: int = 1


@dataclass
class TrainerConfig(CommonTrainerConfig):
    max_iterations: int = MISSING
    stop_after_minutes: float | None = None
    val_every_iterations: int = 1


@dataclass
class PeftConfig:
    """Adapters that are trained in place of the weights; ``model.peft=null``: none."""

    name: str = "lora"
    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(PEFT_TARGETS))


@dataclass
class EpochTrainerConfig(CommonTrainerConfig):
    """The ``trainer`` section where a training goes over its examples in epochs."""

    epochs: int = MISSING


@dataclass
class ModelConfig:
    restore_from: str | None = None
    tokenizer: str | None = None
    export_to: str | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    recompute: str = "none"
    peft: PeftConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)
    gpt: dict[str, Any] | None = None


@dataclass
class PolicyConfig(ModelConfig):
    export_adapter_to: str | None = None


@dataclass
class PriorConfig:
    placement: str = "resident"


@dataclass
class ObjectiveConfig:
    name: str = "brain"
    gamma: float | None = None
    goodness: str | None = None
    goodness_center: float | None = None
    beta: float | None = None


@dataclass
class RemoteConfig:
    """An inference server that samples in place of the training ranks; ``rollout.remote=null``: none."""

    url: str = MISSING
    model: str = MISSING
    server: str = "vllm"
    logprobs: str = "model"
    api_key_env: str | None = None
    concurrency: int = 64
    request_timeout_seconds: float = 600.0
    timeout_seconds: float = 1200.0
    export_to: str | None = None
    reload: list[dict[str, Any]] | None = None


@dataclass
class RolloutConfig:
    prompts_per_iteration: int = MISSING
    outputs_per_prompt: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    truncated_sampling_ok: bool = False
    truncated: str = "keep"
    rescore_proposal: bool = True
    rows_in_flight: int = 256
    save: bool = False
    remote: RemoteConfig | None = None


@dataclass
class TrainConfig:
    epochs_per_iteration: int = 1
    global_batch_size: int = MISSING
    micro_batch_tokens: int = 4096
    layout: str = "auto"
    on_nonfinite: str = "stop"
    min_ess: float = 1.1
    max_kl: float | None = None


@dataclass
class DataConfig:
    train: Any = None
    validation: Any = None
    rollouts: Any = None
    holdout: float = 0.1
    max_prompt_tokens: int = MISSING
    template: str | None = None


@dataclass
class ValidationConfig:
    outputs_per_prompt: int = 1
    max_prompts: int | None = None


@dataclass
class CheckpointConfig:
    resume: str = "auto"
    every_steps: int | None = None
    every_minutes: float | None = 30.0
    at_end: bool = True
    async_save: bool | None = None
    keep_last: int = 2
    keep_best: int = 0
    allow_changes: list[str] = field(default_factory=list)

    @property
    def in_background(self) -> bool:
        """``async_save`` with null resolved."""
        return torch.cuda.is_available() if self.async_save is None else self.async_save


@dataclass
class LoggerConfig:
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None


class TrainingConfig:
    """What the configurations of all kinds of training derive from their keys."""

    @property
    def bf16(self) -> bool:
        return self.trainer.precision == "bf16-mixed"

    @property
    def layout(self) -> str:
        """``train.layout`` with ``auto`` resolved: the prompt of a group is computed once wherever that is exact."""
        return "shared_prefix" if self.train.layout == "auto" else self.train.layout


@dataclass
class EpochDataConfig:
    """The ``data`` section where a training goes over its examples in epochs."""

    train: Any = MISSING
    validation: Any = None
    holdout: float = 0.1
    max_prompt_tokens: int = MISSING
    max_output_tokens: int = MISSING
    template: str | None = None


@dataclass
class EpochConfig(TrainingConfig):
    """What the configurations of trainings by epochs have in common; each adds ``model``, ``train`` and ``data``."""

    run_dir: str = MISSING
    seed: int = 0
    trainer: EpochTrainerConfig = field(default_factory=EpochTrainerConfig)
    optim: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class Config(TrainingConfig):
    run_dir: str = MISSING
    seed: int = 0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: PolicyConfig = field(default_factory=PolicyConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def steps_per_iteration(self) -> int:
        return self.train.epochs_per_iteration * (self.rollout.prompts_per_iteration // self.train.global_batch_size)

    @property
    def objective_options(self) -> dict[str, Any]:
        """The options that were given for the objective, without its name."""
        return {key: value for key, value in vars(self.objective).items() if key != "name" and value is not None}


def check(cfg: DictConfig) -> Config:
    """Validates a configuration.

    Raises:
        ValueError: names the key, what is wrong with it, and the remedy.
    """
    config = typed(Config, cfg, "conf/brain.yaml")
    _check_values(config)
    return config


def typed(kind: type, cfg: DictConfig, file: str) -> Any:
    """``cfg`` as an instance of the structured configuration ``kind``.

    Args:
        file: the configuration file that states every key, for errors.

    Raises:
        ValueError: names the key that is unknown, has no value, or one of another type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), cfg)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = error.full_key or str(error.key)
        close = difflib.get_close_matches(key, _keys(kind), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; the known keys are in {file}"
        raise ValueError(f"unknown configuration key {key}{hint}") from None
    except MissingMandatoryValue as error:
        raise ValueError(
            f"configuration key {error.full_key} has no value: set it in the YAML or on the command line"
        ) from None
    except OmegaConfBaseException as error:
        key = error.full_key or _culprit(kind, cfg)
        raise ValueError(f"configuration key {key}: {str(error).splitlines()[0]}") from None
    _check_finite(config)
    if getattr(config, "reward", None) is not None:
        # A config that names another reward than the one it inherits from sets the other's arguments to null.
        config.reward = {name: value for name, value in config.reward.items() if value is not None}
    return config


def _culprit(kind: type, cfg: DictConfig) -> str:
    """The key that OmegaConf fails on, where its error does not say: alone it has another type, or does not resolve."""
    for path, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        key = ".".join(map(str, path))
        items = [f"{key}[{index}]" for index in range(len(value))] if isinstance(value, list) else []
        try:
            for item in items:
                OmegaConf.select(cfg, item)
            tree = OmegaConf.select(cfg, key) if isinstance(value, str) else value  # an interpolation's value
            for name in reversed(path):
                tree = {name: tree}
            OmegaConf.merge(OmegaConf.structured(kind), tree)
        except OmegaConfBaseException:
            return key
    return "(unknown)"


def _leaves(tree: dict, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The values that are no sections, with the names that lead to them."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _check_finite(section: Any, prefix: str = "") -> None:
    """ValueError for a key whose value is NaN or infinite: every comparison with a bound would let it pass or not by
    accident."""
    for name, value in vars(section).items():
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{name} must be a finite number, not {value}")


def _keys(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys of the schema."""
    keys = []
    for item in dataclasses.fields(kind):
        keys.append(prefix + item.name)
        nested = item.default_factory
        if dataclasses.is_dataclass(nested):
            keys += _keys(nested, f"{prefix}{item.name}.")
    return keys


def _check_values(config: Config) -> None:
    rollout, train, trainer = config.rollout, config.train, config.trainer
    check_common(config)
    among("prior.placement", config.prior.placement, ("resident", "offload", "adapter_off"))
    among("rollout.truncated", rollout.truncated, ("keep", "mask"))
    among("train.on_nonfinite", train.on_nonfinite, ("stop", "skip"))
    at_least(
        1,
        {
            "trainer.max_iterations": trainer.max_iterations,
            "trainer.val_every_iterations": trainer.val_every_iterations,
            "rollout.prompts_per_iteration": rollout.prompts_per_iteration,
            "rollout.max_new_tokens": rollout.max_new_tokens,
            "rollout.rows_in_flight": rollout.rows_in_flight,
            "train.epochs_per_iteration": train.epochs_per_iteration,
            "validation.outputs_per_prompt": config.validation.outputs_per_prompt,
            "validation.max_prompts": config.validation.max_prompts,
            "checkpoint.every_steps": config.checkpoint.every_steps,
            "checkpoint.keep_last": config.checkpoint.keep_last,
        },
    )
    if config.model.peft is None:
        if config.prior.placement == "adapter_off":
            raise ValueError(
                "prior.placement=adapter_off is the policy without its adapters, and there are none: set model.peft, "
                "or prior.placement to resident or offload"
            )
        if config.model.export_adapter_to is not None:
            raise ValueError("model.export_adapter_to needs model.peft: use model.export_to for the trained weights")
    if config.model.export_to is not None and config.model.export_to == config.model.export_adapter_to:
        raise ValueError("model.export_to and model.export_adapter_to are one directory: name two")
    at_least(2, {"rollout.outputs_per_prompt": rollout.outputs_per_prompt})
    at_least(0, {"checkpoint.keep_best": config.checkpoint.keep_best})
    for key, minutes in {
        "trainer.stop_after_minutes": trainer.stop_after_minutes,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
    }.items():
        if minutes is not None and not minutes > 0:
            raise ValueError(f"{key} must be above 0 or null, not {minutes}")
    if not rollout.temperature > 0:
        raise ValueError(f"rollout.temperature must be above 0, not {rollout.temperature}")
    if rollout.top_k < 0 or not 0 < rollout.top_p <= 1:
        raise ValueError("rollout.top_k must be at least 0 (0: off) and rollout.top_p in (0, 1] (1: off)")
    if (rollout.top_k or rollout.top_p < 1) and not rollout.truncated_sampling_ok:
        raise ValueError(
            "rollout.top_k and rollout.top_p give outputs outside the truncation probability zero, and the importance "
            "weights cannot correct that; leave them off, or set rollout.truncated_sampling_ok=true"
        )
    if (rollout.top_k or rollout.top_p < 1) and rollout.rescore_proposal:
        raise ValueError(
            "rollout.rescore_proposal scores the untruncated law, which is not the one that top_k/top_p sample: "
            "set rollout.rescore_proposal=false"
        )
    if rollout.remote is not None:
        _check_remote(rollout.remote, config)
    _check_patience_of_rewards("reward", config.reward, config)
    if rollout.prompts_per_iteration % train.global_batch_size:
        raise ValueError(
            f"rollout.prompts_per_iteration ({rollout.prompts_per_iteration}) must be a multiple of "
            f"train.global_batch_size ({train.global_batch_size} groups), so that every step has a whole batch"
        )
    if (config.data.train is None) == (config.data.rollouts is None):
        raise ValueError("set either data.train (prompts to sample for) or data.rollouts (groups sampled elsewhere)")


def check_common(config: Any) -> None:
    """Checks what the configurations of all kinds of training have in common."""
    model, train, trainer = config.model, config.train, config.trainer
    among("trainer.precision", trainer.precision, ("32", "bf16-mixed"))
    among("trainer.fp8", trainer.fp8, (None, "hybrid", "e4m3"))
    among("trainer.fp8_recipe", trainer.fp8_recipe, ("delayed", "tensorwise", "blockwise", "mxfp8"))
    among("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "gpu"))
    among("model.recompute", model.recompute, ("none", "selective", "full"))
    if hasattr(train, "layout"):
        among("train.layout", train.layout, ("auto", *LAYOUTS))
    at_least(
        1,
        {
            "trainer.devices": trainer.devices,
            "trainer.num_nodes": trainer.num_nodes,
            "trainer.log_every_steps": trainer.log_every_steps,
            "model.tensor_model_parallel_size": model.tensor_model_parallel_size,
            "model.pipeline_model_parallel_size": model.pipeline_model_parallel_size,
            "train.global_batch_size": train.global_batch_size,
            "train.micro_batch_tokens": train.micro_batch_tokens,
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
        },
    )
    if not trainer.hang_timeout_minutes > 0:
        raise ValueError(f"trainer.hang_timeout_minutes must be above 0, not {trainer.hang_timeout_minutes}")
    if model.peft is not None:
        _check_peft(model.peft, model.tensor_model_parallel_size)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2^32, not {config.seed}")  # NumPy's bounds
    if trainer.fp8 is not None and not config.bf16:
        raise ValueError("trainer.fp8 needs trainer.precision=bf16-mixed: what is not FP8 is bf16")
    if model.context_parallel_size != 1:
        raise ValueError(
            "model.context_parallel_size must be 1: groups are packed rows, which context parallelism does not split; "
            "use tensor and sequence parallelism for long rows"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise ValueError("model.sequence_parallel needs model.tensor_model_parallel_size above 1")
    if model.virtual_pipeline_model_parallel_size is not None:
        at_least(2, {"model.virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size})
        if model.pipeline_model_parallel_size == 1:
            raise ValueError(
                "model.virtual_pipeline_model_parallel_size needs model.pipeline_model_parallel_size above 1"
            )
    holdout = config.data.holdout
    if not holdout >= 0 or (holdout > 1 and holdout % 1 != 0):
        raise ValueError(f"data.holdout must be a fraction below 1 or a number of prompts, not {holdout}")


def _check_peft(peft: PeftConfig, tensor_parallel: int) -> None:
    key = "model.peft"
    among(f"{key}.name", peft.name, ("lora",))
    at_least(1, {f"{key}.dim": peft.dim, f"{key}.alpha": peft.alpha})
    if peft.dim % tensor_parallel:
        raise ValueError(
            f"{key}.dim ({peft.dim}) must be a multiple of model.tensor_model_parallel_size ({tensor_parallel}): an "
            "adapter's rows are divided over the ranks"
        )
    if peft.dropout != 0:
        raise ValueError(f"{key}.dropout must be 0: with dropout the policy is not the law that was sampled from")
    if not peft.target_modules:
        raise ValueError(f"{key}.target_modules is empty: name some of {', '.join(PEFT_TARGETS)}")
    for name in peft.target_modules:
        among(f"{key}.target_modules", name, PEFT_TARGETS)
    if len(set(peft.target_modules)) < len(peft.target_modules):
        raise ValueError(f"{key}.target_modules names a module twice: {', '.join(peft.target_modules)}")


def _check_remote(remote: RemoteConfig, config: Config) -> None:
    rollout, key = config.rollout, "rollout.remote"
    among(f"{key}.server", remote.server, ("vllm", "sglang", "trtllm"))
    among(f"{key}.logprobs", remote.logprobs, ("model", "sampled"))
    at_least(1, {f"{key}.concurrency": remote.concurrency})
    for name in ("request_timeout_seconds", "timeout_seconds"):
        if not getattr(remote, name) > 0:
            raise ValueError(f"{key}.{name} must be above 0, not {getattr(remote, name)}")
    check_patience(f"{key}.timeout_seconds", remote.timeout_seconds, config)
    if not re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", remote.url):
        raise ValueError(f"{key}.url must be an address like http://HOST:PORT, not {remote.url!r}")
    truncated = rollout.top_k > 0 or rollout.top_p < 1
    if (rollout.temperature != 1.0 or truncated) and remote.logprobs == "model":
        raise ValueError(
            f"{key}.logprobs=model says that the server gives the model's log-probs at temperature 1, but outputs are "
            "sampled from another law (rollout.temperature, top_k, top_p): have it give that law's (vLLM: "
            f"--logprobs-mode processed_logprobs) and set {key}.logprobs=sampled, or sample the model's own law"
        )
    if truncated and remote.server != "vllm":
        raise ValueError(
            f"rollout.top_k and rollout.top_p need {key}.server=vllm: the log-probs of {remote.server} leave them out"
        )
    if (remote.export_to is None) != (remote.reload is None):
        raise ValueError(
            f"{key}.export_to (where each iteration's policy is written) and {key}.reload (how the server loads it) go "
            "together: set both, or neither"
        )
    if remote.reload is None and rollout.rescore_proposal and config.trainer.max_iterations > 1:
        raise ValueError(
            f"without {key}.reload the server keeps its first weights, and rollout.rescore_proposal would score its "
            f"outputs with newer ones: set {key}.reload, rollout.rescore_proposal=false or trainer.max_iterations=1"
        )
    for number, step in enumerate(remote.reload or ()):
        _check_reload_step(f"{key}.reload[{number}]", step)


def check_patience(key: str, seconds: float, config: TrainingConfig) -> None:
    """Raises ValueError where one rank may wait for a server longer than the others wait for that rank."""
    if seconds >= 60 * config.trainer.hang_timeout_minutes:
        raise ValueError(
            f"{key} ({seconds:g}) must be less than trainer.hang_timeout_minutes "
            f"({config.trainer.hang_timeout_minutes:g}), after which the other ranks take the run for one that hangs: "
            "lower it, or raise the minutes"
        )


def _check_patience_of_rewards(key: str, section: Any, config: TrainingConfig) -> None:
    """Of a reward's ``timeout_seconds``, and of those of its parts."""
    items = section.items() if isinstance(section, dict) else enumerate(section) if isinstance(section, list) else ()
    for name, value in items:
        if name == "timeout_seconds" and isinstance(value, (int, float)):
            check_patience(f"{key}.{name}", value, config)
        _check_patience_of_rewards(f"{key}.{name}", value, config)


def _check_reload_step(key: str, step: dict[str, Any]) -> None:
    kinds = step.keys() & {"path", "url", "command"}
    allowed = {"command"} if kinds == {"command"} else {*kinds, "method", "json"}
    if len(kinds) != 1 or step.keys() - allowed:
        raise ValueError(
            f"{key} must be {{path or url: ..., method: POST, json: ...}} or {{command: [...]}}, not {step}"
        )
    (kind,) = kinds
    parts = step[kind] if kind == "command" else [step[kind], step.get("method", "POST")]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{key}.{kind} must be {'a list of strings' if kind == 'command' else 'text'}, not {step}")


def among(key: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(map(str, known))}, not {value!r}")


def at_least(least: int, values: dict[str, int | None]) -> None:
    for key, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{key} must be at least {least}, not {value}")
