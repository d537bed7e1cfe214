"""The configuration of BRAIn's training: what ``conf/brain.yaml`` explains.

Everything that can be wrong without looking at data or weights is refused here, before any heavy work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig

from nemo_brain.config.checks import check_common, check_patience, check_patience_of_rewards, given_arguments
from nemo_brain.config.common import (
    LENGTH,
    STEPS,
    CommonDataConfig,
    CommonTrainerConfig,
    GroupTrainConfig,
    ModelConfig,
    OutputsConfig,
    TrainingConfig,
)
from nemo_brain.config.remote import RemoteConfig, check_remote
from nemo_brain.config.schema import key, parse
from nemo_brain.objectives.registry import complete_options, objective_class


@dataclass
class TrainerConfig(CommonTrainerConfig):
    max_iterations: int = key(MISSING, "rounds of sampling, scoring and training", at_least=1, resumable=LENGTH)
    val_every_iterations: int = key(1, "iterations from one validation to the next", at_least=1, resumable=True)


@dataclass
class PolicyConfig(ModelConfig):
    restore_from: str | None = key(
        None,
        "the start model and prior: a Hugging Face directory, a .gguf file, package:NAME (the GGUF file in an "
        "installed package), or a run's directory or checkpoint; null: from scratch by model.gpt",
    )
    export_adapter_to: str | None = key(
        None, "with peft: a directory for the adapters alone, in the format of the PEFT library", resumable=True
    )


@dataclass
class PriorConfig:
    placement: str = key(
        "resident",
        among={
            "resident": "a second copy beside the policy",
            "offload": "host memory, moved in to score",
            "adapter_off": "with model.peft: the policy without its adapters, no copy",
        },
        resumable=True,
    )


@dataclass
class RolloutConfig(OutputsConfig):
    engine: str | None = key(
        None,
        "what samples",
        among={
            None: "server with rollout.remote, otherwise own",
            "own": "the training kernels",
            "server": "see remote",
            "colocated": "vLLM in the training processes, on their devices",
        },
        resumable=True,
    )
    colocated_memory: float = key(
        0.4,
        "the fraction of a GPU's memory that a colocated vLLM has while it samples",
        above=0,
        below=1,
        resumable=True,
    )
    colocated_options: dict[str, Any] | None = key(
        None, "more arguments of a colocated vLLM's vllm.LLM", resumable=True
    )
    prompts_per_iteration: int = key(MISSING, "a multiple of train.global_batch_size", at_least=1, resumable=STEPS)
    outputs_per_prompt: int = key(MISSING, "n; as many as the objective needs, most of them 2", at_least=1)
    temperature: float = key(1.0, "of the proposal; enters log q' alone", above=0)
    top_k: int = key(0, "0: off; with top_p refused unless ...", at_least=0)
    top_p: float = key(1.0, "1: off", above=0, at_most=1)
    truncated_sampling_ok: bool = key(
        False, "... this says that weights which cannot correct the truncation are accepted"
    )
    truncated: str = key("keep", "outputs without an end token", among={"keep": "", "mask": "they leave the weights"})
    refresh: str = key(
        "always",
        "the proposal",
        among={
            "always": "the policy as it stands at each iteration",
            "never": "the start model: for dpo_sft, dpo, ipo, hinge, slic, rpo, infonca, nca",
            "kl_adaptive": "GDC's: the start model, then the policy of an earlier iteration, until the policy as it "
            "stands is nearer to the target by an estimate of both KLs; a third set of weights, with model.peft of "
            "adapters",
        },
    )
    refresh_every: int = key(1, "kl_adaptive: iterations from one such question to the next", at_least=1)
    ahead: int = key(
        0,
        "iterations that rollout.remote samples ahead while the ranks train, with its own log q' "
        "(rescore_proposal=false): docs/remote_sampling.md",
        at_least=0,
        resumable=True,
    )
    rescore_proposal: bool = key(True, "log q' by the training kernels rather than the sampler's")
    max_proposal_gap: float | None = key(
        None,
        "nats per token, |log q' by the training kernels - by the sampler's| on average: the run ends above it; null: "
        "by trainer.precision: 1e-3 (32), 0.05 (bf16-mixed), 0.2 (with fp8)",
        above=0,
        resumable=True,
    )
    rows_in_flight: int = key(256, "outputs sampled at a time by each data-parallel rank", at_least=1, resumable=True)
    save: bool = key(False, "rollouts.jsonl, which data.rollouts reads", resumable=True)
    remote: RemoteConfig | None = key(
        None,
        "null (the training ranks sample) | an inference server, see docs/remote_sampling.md",
        resumable=True,
    )


@dataclass
class TrainConfig(GroupTrainConfig):
    epochs_per_iteration: int = key(1, "passes over an iteration's groups", at_least=1, resumable=STEPS)
    global_batch_size: int = key(MISSING, "groups per optimizer step", at_least=1, resumable=STEPS)
    micro_batch_tokens: int = key(
        4096,
        "row positions per micro-batch; of new prompts in one pass of sampling",
        at_least=1,
        resumable=True,
    )
    on_nonfinite: str = key(
        "stop",
        "a step whose gradient, an output whose reward is not finite; the groups go to a file",
        among={"stop": "", "skip": "left out"},
        resumable=True,
    )
    min_ess: float = key(
        1.1, "warn where the posterior's weights rest on fewer outputs per group, on average", resumable=True
    )
    max_kl: float | None = key(
        None, "nats: the run saves and stops where an iteration's KL to the prior is above it", resumable=True
    )


@dataclass
class DataConfig(CommonDataConfig):
    train: Any = key(
        None,
        "a path (package:NAME/PATH: in an installed package), a list of paths, or _target_: a callable that returns "
        "records",
    )
    holdout: float = key(0.1, "a fraction below 1, or a number of prompts; 0: no validation", at_least=0)
    rollouts: Any = key(None, "groups sampled elsewhere, instead of data.train")


@dataclass
class ValidationConfig:
    outputs_per_prompt: int = key(1, "sampled for each held-out prompt", at_least=1)
    max_prompts: int | None = key(None, "so many of the held-out prompts; null: all", at_least=1)


@dataclass
class Config(TrainingConfig):
    trainer: TrainerConfig = key(TrainerConfig)
    model: PolicyConfig = key(PolicyConfig)
    prior: PriorConfig = key(PriorConfig)
    objective: dict[str, Any] = key(
        {},
        "name (docs/objectives.md) or _target_ (the import path of an Objective of your own), and its options; one "
        "that is null is left out: the objective's own default holds",
    )
    rollout: RolloutConfig = key(RolloutConfig)
    train: TrainConfig = key(TrainConfig)
    reward: dict[str, Any] | None = key(
        None,
        "instantiated by Hydra: any callable like nemo_brain/rewards/protocol.py's Reward; null arguments are left "
        "out. docs/rewards.md: reward models, servers, weighted sums",
    )
    data: DataConfig = key(DataConfig)
    validation: ValidationConfig = key(ValidationConfig, "at temperature 1, always with the same draws")

    @property
    def lengths(self) -> dict[str, int]:
        return {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "rollout.max_new_tokens": self.rollout.max_new_tokens,
        }

    @property
    def max_proposal_gap(self) -> float:
        """Nats per token. The defaults are 50 times what one saw in fp32 (two kernels' rounding), and in lower
        precision what outputs of few tokens may show."""
        given, trainer = self.rollout.max_proposal_gap, self.trainer
        return given if given is not None else 0.2 if trainer.fp8 else 0.05 if trainer.bf16 else 1e-3

    @property
    def steps_per_iteration(self) -> int:
        return self.train.epochs_per_iteration * (self.rollout.prompts_per_iteration // self.train.global_batch_size)


def check(cfg: DictConfig) -> Config:
    """Validates a configuration.

    Raises:
        ValueError: names the key, what is wrong with it, and the remedy.
    """
    config = parse(Config, cfg, "conf/brain.yaml")
    config.reward = given_arguments(config.reward)
    config.objective = complete_options(config.objective)
    _check_group_size(config.rollout, objective_class(config.objective).smallest_group)
    check_common(config)
    _check_adapters(config.model, config.prior)
    _check_refresh(config.rollout)
    _check_truncation(config.rollout)
    _check_engine(config.rollout)
    _check_ahead(config.rollout, config.data)
    if config.rollout.remote is not None:
        _check_remote(config.rollout.remote, config.rollout, config.trainer)
    check_patience_of_rewards("reward", config.reward, config.trainer)
    batch, prompts, data = config.train.global_batch_size, config.rollout.prompts_per_iteration, config.data
    if prompts % batch:
        raise ValueError(
            f"rollout.prompts_per_iteration ({prompts}) must be a multiple of train.global_batch_size ({batch} "
            "groups), so that every step has a whole batch"
        )
    if (data.train is None) == (data.rollouts is None):
        raise ValueError("set either data.train (prompts to sample for) or data.rollouts (groups sampled elsewhere)")
    if data.rollouts is not None and config.rollout.refresh != "always":
        raise ValueError("rollout.refresh says what samples, and with data.rollouts nothing does: leave it out")
    return config


def _check_group_size(rollout: RolloutConfig, smallest: int) -> None:
    if rollout.outputs_per_prompt < smallest:
        raise ValueError(
            f"rollout.outputs_per_prompt must be at least {smallest}, not {rollout.outputs_per_prompt}: the objective "
            "takes nothing from smaller groups"
        )


def _check_adapters(model: PolicyConfig, prior: PriorConfig) -> None:
    if model.peft is None:
        if prior.placement == "adapter_off":
            raise ValueError(
                "prior.placement=adapter_off is the policy without its adapters, and there are none: set model.peft, "
                "or prior.placement to resident or offload"
            )
        if model.export_adapter_to is not None:
            raise ValueError("model.export_adapter_to needs model.peft: use model.export_to for the trained weights")
    if model.export_to is not None and model.export_to == model.export_adapter_to:
        raise ValueError("model.export_to and model.export_adapter_to are one directory: name two")


def _check_refresh(rollout: RolloutConfig) -> None:
    if rollout.refresh == "kl_adaptive" and not rollout.rescore_proposal:
        raise ValueError(
            "rollout.refresh=kl_adaptive compares log-probs of policy and proposal by the same kernels: set "
            "rollout.rescore_proposal=true"
        )


def _check_ahead(rollout: RolloutConfig, data: DataConfig) -> None:
    if not rollout.ahead:
        return
    if rollout.remote is None or not rollout.remote.follows or rollout.refresh != "always" or data.rollouts:
        raise ValueError(
            "rollout.ahead has an inference server sample with the policy while the training ranks do something else: "
            "it needs rollout.remote with reload and export_to, or transfer=process_group, rollout.refresh=always, and "
            "no data.rollouts"
        )
    if rollout.rescore_proposal:
        raise ValueError(
            "rollout.ahead trains on outputs of weights that the ranks no longer have, so that "
            "rollout.rescore_proposal cannot compute their log q': set it to false, and the server's are taken"
        )


def _truncates(rollout: RolloutConfig) -> bool:
    return rollout.top_k > 0 or rollout.top_p < 1


def _check_truncation(rollout: RolloutConfig) -> None:
    if _truncates(rollout) and not rollout.truncated_sampling_ok:
        raise ValueError(
            "rollout.top_k and rollout.top_p give outputs outside the truncation probability zero, and the importance "
            "weights cannot correct that; leave them off, or set rollout.truncated_sampling_ok=true"
        )
    if _truncates(rollout) and rollout.rescore_proposal:
        raise ValueError(
            "rollout.rescore_proposal scores the untruncated law, which is not the one that top_k/top_p sample: "
            "set rollout.rescore_proposal=false"
        )


def _check_engine(rollout: RolloutConfig) -> None:
    name = "rollout.engine"
    if rollout.remote is None and rollout.engine == "server":
        raise ValueError(f"{name}=server needs rollout.remote, which says where it is and how it is asked")
    if rollout.remote is not None and rollout.engine in ("own", "colocated"):
        raise ValueError(
            f"rollout.remote is what {name}=server samples with, and {name} is {rollout.engine}: set "
            f"rollout.remote=null, or leave {name} out"
        )
    if rollout.engine == "colocated" and rollout.refresh != "always":
        raise ValueError(
            f"{name}=colocated samples from the policy as it stands: rollout.refresh={rollout.refresh} needs {name}=own"
        )


def _check_remote(remote: RemoteConfig, rollout: RolloutConfig, trainer: TrainerConfig) -> None:
    name = "rollout.remote"
    check_remote(remote, name)
    check_patience(f"{name}.timeout_seconds", remote.timeout_seconds, trainer)
    if (rollout.temperature != 1.0 or _truncates(rollout)) and remote.logprobs == "model":
        raise ValueError(
            f"{name}.logprobs=model says that the server gives the model's log-probs at temperature 1, but outputs are "
            "sampled from another law (rollout.temperature, top_k, top_p): have it give that law's (vLLM: "
            f"--logprobs-mode processed_logprobs) and set {name}.logprobs=sampled, or sample the model's own law"
        )
    if _truncates(rollout) and remote.server != "vllm":
        raise ValueError(
            f"rollout.top_k and rollout.top_p need {name}.server=vllm: the log-probs of {remote.server} leave them out"
        )
    if rollout.refresh == "kl_adaptive" and not remote.follows:
        raise ValueError(
            f"rollout.refresh=kl_adaptive gives the server another proposal from time to time: set {name}.reload and "
            f"{name}.export_to, or {name}.transfer=process_group"
        )
    if rollout.refresh == "never" and remote.follows:
        raise ValueError(
            f"rollout.refresh=never samples from the start model, with which the server is started: set {name}.reload "
            f"and {name}.export_to to null, and {name}.transfer to directory"
        )
    always = rollout.refresh == "always"
    if always and not remote.follows and rollout.rescore_proposal and trainer.max_iterations > 1:
        raise ValueError(
            f"without {name}.reload the server keeps its first weights, and rollout.rescore_proposal would score its "
            f"outputs with newer ones: set {name}.transfer=process_group (vLLM), {name}.reload, "
            "rollout.rescore_proposal=false or trainer.max_iterations=1"
        )
