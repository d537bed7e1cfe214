"""What the configurations of all kinds of training share: sections, and the checks of keys that go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import MISSING

from nemo_brain.config.schema import Never, Unless, key
from nemo_brain.core.packing import LAYOUTS

# Of the keys that say how long a training is.
LENGTH = Unless(
    "optim.sched",
    "the learning rates depend on the length: if allowed, the steps that follow are made with those of a run that has "
    "had the new length from its start, which this one has not",
)
# Of the keys that say how many steps there are in an epoch or an iteration.
STEPS = Never("it is counted in steps where the run stands: a run with other batches would not be there")
# The linear layers of a transformer layer, by Megatron's names.
PEFT_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass
class RanksConfig:
    """The keys of ``trainer`` wherever a model is split over ranks."""

    devices: int | None = key(
        None,
        "processes on each node; null: as many as torchrun started, otherwise 1",
        at_least=1,
        resumable=True,
    )
    num_nodes: int = key(1, "torchrun's --nnodes", at_least=1, resumable=True)
    accelerator: str = key("auto", among={"auto": "", "cpu": "", "gpu": ""}, resumable=True)
    precision: str = key("32", among={"32": "", "bf16-mixed": "bf16 weights with fp32 master weights"})
    fp8: str | None = key(
        None,
        "FP8 matrix products by Transformer Engine, beside bf16-mixed",
        among={None: "", "hybrid": "", "e4m3": ""},
    )
    fp8_recipe: str = key("delayed", among={"delayed": "", "tensorwise": "", "blockwise": "", "mxfp8": ""})
    hang_timeout_minutes: float = key(
        30.0,
        "without progress on any rank: then all print their stacks and end",
        above=0,
        resumable=True,
    )

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16-mixed"


@dataclass
class CommonTrainerConfig(RanksConfig):
    """The keys of ``trainer`` in every kind of training."""

    stop_after_minutes: float | None = key(
        None,
        "of wall-clock time: then the run saves and ends, as after Ctrl-C",
        above=0,
        resumable=True,
    )
    log_every_steps: int = key(1, "to the loggers; metrics.jsonl has every step", at_least=1, resumable=True)


@dataclass
class EpochTrainerConfig(CommonTrainerConfig):
    """The ``trainer`` section where a training goes over its examples in epochs."""

    epochs: int = key(
        MISSING, "passes over the training data; an evaluation follows each", at_least=1, resumable=LENGTH
    )


@dataclass
class PeftConfig:
    """Adapters that are trained in place of the weights; ``model.peft=null``: none."""

    name: str = key("lora", "the method", among={"lora": ""})
    dim: int = key(32, "the rank of an adapter, a multiple of tensor_model_parallel_size", at_least=1)
    alpha: int = key(32, "an adapter's output is multiplied by alpha / dim", at_least=1)
    dropout: float = key(0.0, "must be 0: with dropout the policy is not the law that was sampled from")
    target_modules: list[str] = key(
        list(PEFT_TARGETS), "the linear layers that have adapters", among=dict.fromkeys(PEFT_TARGETS, "")
    )


@dataclass
class SplitModelConfig:
    """The keys of ``model`` wherever one is split over ranks."""

    restore_from: str | None = key(
        None,
        "a Hugging Face directory, a .gguf file, package:NAME (the GGUF file in an installed package), or a run's "
        "directory or checkpoint; null: from scratch by model.gpt",
    )
    allow_nonfinite: bool = key(
        False,
        "tensors of restore_from with values that are NaN or infinite are taken, rather than refused by file and name",
        resumable=True,
    )
    tensor_model_parallel_size: int = key(1, "ranks that share every layer", at_least=1, resumable=True)
    pipeline_model_parallel_size: int = key(1, "stages of layers, on ranks of their own", at_least=1, resumable=True)
    sequence_parallel: bool = key(
        False, "with tensor parallelism: activations between layers are divided too", resumable=True
    )
    options: dict[str, Any] = key(
        {},
        "more fields of NeMo's GPTConfig: recompute_num_layers, tp_comm_overlap, ... but none that says what the model "
        "computes",
        resumable=True,
    )


@dataclass
class ModelConfig(SplitModelConfig):
    """The keys of ``model`` in every kind of training."""

    tokenizer: str | None = key(None, "from scratch only: a Hugging Face directory with a tokenizer; null: bytes")
    export_to: str | None = key(
        None,
        "where the model is written in Hugging Face's format when training ends; an earlier export there is replaced; "
        "null: nowhere",
        resumable=True,
    )
    push_to: str | None = key(
        None,
        "organisation/name: the repository of the Hugging Face hub that the export is pushed to, with the token in "
        "HF_TOKEN; made, private, where there is none; null: nowhere",
        resumable=True,
    )
    virtual_pipeline_model_parallel_size: int | None = key(
        None, "parts of each stage, interleaved; null: one", at_least=2, resumable=True
    )
    context_parallel_size: int = key(1, "must be 1: packed rows are not divided over ranks")
    recompute: str = key(
        "none",
        "activations that the backward pass computes again",
        among={"none": "", "selective": "attention", "full": "every layer"},
        resumable=True,
    )
    peft: PeftConfig | None = key(
        None, "null (all weights are trained) | adapters instead, and a reward model's head, see docs/lora.md"
    )
    gpt: dict[str, Any] | None = key(
        None, "from scratch only, null otherwise: fields of NeMo's GPTConfig and of PackedGPTConfig"
    )


@dataclass
class OutputsConfig:
    """The keys of ``rollout`` wherever outputs are sampled."""

    max_new_tokens: int = key(MISSING, "of an output", at_least=1)
    stop_token_ids: list[int] | None = key(
        None,
        "tokens that end an output; null: those that the tokenizer, generation_config.json and config.json name",
        at_least=0,
    )
    stop_strings: list[str] = key([], "texts that end an output, which ends before them")


@dataclass
class CommonTrainConfig:
    """The keys of ``train`` in every kind of training."""

    global_batch_size: int = key(
        MISSING,
        "examples (pairs, completions) per optimizer step; fewer by a few where they do not divide the training data",
        at_least=1,
        resumable=STEPS,
    )
    micro_batch_tokens: int = key(
        4096,
        "row positions per micro-batch; a longer example has a row of its own",
        at_least=1,
        resumable=True,
    )
    on_nonfinite: str = key(
        "stop",
        "a step whose gradient is not finite",
        among={"stop": "", "skip": "left out"},
        resumable=True,
    )

    @property
    def row_layout(self) -> str:
        """How outputs are laid out in rows. A single output shares its prompt with no other: one causal sequence."""
        return "separate_rows"


@dataclass
class GroupTrainConfig(CommonTrainConfig):
    """The ``train`` section where a prompt has several outputs."""

    layout: str = key(
        "auto",
        among={
            "auto": "",
            **dict.fromkeys(LAYOUTS, ""),
            "shared_prefix": "a prompt is computed once for its outputs",
        },
        resumable=True,
    )

    @property
    def row_layout(self) -> str:
        """``layout`` with ``auto`` resolved: a prompt is computed once wherever that is exact."""
        return "shared_prefix" if self.layout == "auto" else self.layout


@dataclass
class CommonDataConfig:
    """The keys of ``data`` in every kind of training."""

    train: Any = key(None)
    validation: Any = key(None, "the same; null: data.holdout of the training data")
    holdout: float = key(
        0.1,
        "a fraction below 1, or a number, of conversations, which stay together; 0: no evaluation",
        at_least=0,
    )
    max_prompt_tokens: int = key(MISSING, "longer prompts lose tokens on the left", at_least=1)
    template: str | None = key(None, "null (text as it is) | chat | a format string with {prompt}")


@dataclass
class EpochDataConfig(CommonDataConfig):
    """The ``data`` section where a training goes over its examples in epochs."""

    max_output_tokens: int = key(
        MISSING,
        "longer outputs lose tokens on the right, with the end token, which is counted",
        at_least=2,
    )


@dataclass
class EpochValidationConfig:
    samples: int = key(8, "held-out examples shown in the report, before and after training; 0: none", at_least=0)


@dataclass
class CheckpointConfig:
    resume: str = key(
        "auto", "auto (an unfinished run in run_dir goes on) | never | a checkpoint, or a directory of them"
    )
    every_steps: int | None = key(None, "optimizer steps; null: only by time", at_least=1)
    every_minutes: float | None = key(30.0, "of wall-clock time; null: only by steps", above=0)
    at_end: bool = key(True, "one after the last step")
    async_save: bool | None = key(
        None,
        "true: written while training goes on, from a copy in host memory; null: where there is CUDA",
    )
    keep_last: int = key(2, "so many of the newest are kept", at_least=1)
    keep_best: int = key(0, "besides, so many of the best held-out results", at_least=0)
    allow_changes: list[str] = key(
        [], "keys that may differ from the checkpoint's although they change what is computed"
    )

    @property
    def in_background(self) -> bool:
        """``async_save`` with null resolved."""
        return torch.cuda.is_available() if self.async_save is None else self.async_save


@dataclass
class MLflowConfig:
    """A run in MLflow; ``logger.mlflow=null``: none."""

    tracking_uri: str | None = key(
        None, "http://HOST:PORT, a database, a directory; null: MLFLOW_TRACKING_URI, otherwise run_dir/mlflow"
    )
    experiment: str = key("nemo_brain", "is made where there is none of this name")
    run_name: str | None = key(None, "null: the last part of run_dir")


@dataclass
class LoggerConfig:
    tensorboard: bool = key(True, "curves in run_dir/tensorboard")
    wandb: dict[str, Any] | None = key(
        None, "arguments of Lightning's WandbLogger: {project: ..., name: ..., offline: ...}; null: none"
    )
    mlflow: MLflowConfig | None = key(None, "null (none) | a run in MLflow, which a resumed run goes on with")


@dataclass
class TrainingConfig:
    """The configuration of any kind of training; each kind has sections of its own, and says more of these."""

    run_dir: str = key(
        MISSING,
        "metrics, samples, report, checkpoints; an earlier run there is moved aside",
        resumable=True,
    )
    seed: int = key(
        0,
        "a run is a function of its configuration and this seed",
        at_least=0,
        below=2**32,  # NumPy's bounds
    )
    trainer: CommonTrainerConfig = key(CommonTrainerConfig)
    model: ModelConfig = key(ModelConfig)
    train: CommonTrainConfig = key(CommonTrainConfig)
    optim: dict[str, Any] = key(
        {}, "fields of Megatron's OptimizerConfig; sched: name and arguments of a NeMo scheduler"
    )
    ddp: dict[str, Any] = key(
        {},
        "fields of Megatron's DistributedDataParallelConfig; the precision of sums (grad_reduce_in_fp32) is kept on "
        "resume",
        resumable=True,
    )
    data: CommonDataConfig = key(CommonDataConfig)
    checkpoint: CheckpointConfig = key(
        CheckpointConfig, "in run_dir/checkpoints; see docs/checkpoints.md", resumable=True
    )
    logger: LoggerConfig = key(LoggerConfig, resumable=True)

    @property
    def layout(self) -> str:
        return self.train.row_layout

    @property
    def lengths(self) -> dict[str, int]:
        """The most tokens of a prompt and of an output, by their keys."""
        raise NotImplementedError


@dataclass
class EpochConfig(TrainingConfig):
    """The configuration of a training that goes over its examples in epochs."""

    trainer: EpochTrainerConfig = key(EpochTrainerConfig)
    data: EpochDataConfig = key(EpochDataConfig)
    validation: EpochValidationConfig = key(EpochValidationConfig)

    @property
    def lengths(self) -> dict[str, int]:
        return {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "data.max_output_tokens": self.data.max_output_tokens,
        }
