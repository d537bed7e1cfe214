"""The model of a training: start weights, Megatron's configuration, adapters, what ends its outputs, its export.

Errors name the configuration key and the remedy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_brain.config.common import ModelConfig, OutputsConfig, PeftConfig, RanksConfig
from nemo_brain.config.schema import check_names
from nemo_brain.convert.export import check_target, make_export
from nemo_brain.convert.mapping import MappedExport
from nemo_brain.convert.open import start_weights
from nemo_brain.core.first_use import working
from nemo_brain.data.stop import Stop, choose_stop
from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE
from nemo_brain.host.options import INTERLEAVED, give_fused_rotary, gpt_options, lacks_fused_rotary
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.lora import LoRA
from nemo_brain.model.weights import Weights

# Fields of a GPT's configuration that follow from keys outside the model's section.
_OWN_KEYS = {
    **dict.fromkeys(("fp16", "bf16", "params_dtype", "pipeline_dtype", "enable_autocast"), "trainer.precision"),
    **{name: f"trainer.{name}" for name in ("fp8", "fp8_recipe")},
}


def make_weights(model: ModelConfig, seed: int) -> Weights:
    """The start weights; ``seed``: of those of a model from scratch."""
    if model.restore_from is not None and model.gpt:
        raise ValueError("model.gpt describes a model from scratch: set model.gpt=null with model.restore_from")
    weights = start_weights(model.restore_from, model.gpt, model.tokenizer, seed, model.allow_nonfinite)
    if len(weights.tokenizer) > weights.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(weights.tokenizer)} tokens, the checkpoint model.restore_from="
            f"{model.restore_from} only {weights.vocab_size}: they do not belong together"
        )
    return weights


def make_gpt_config(
    model: ModelConfig,
    trainer: RanksConfig,
    weights: Weights,
    lengths: Mapping[str, int],
    kind: type[PackedGPTConfig] = PackedGPTConfig,
) -> PackedGPTConfig:
    """The configuration of a model of ``weights``.

    Args:
        lengths: the most tokens of a prompt and of an output, by their keys.
    """
    if trainer.fp8 is not None and not HAVE_TRANSFORMER_ENGINE:
        raise ValueError("trainer.fp8 needs Transformer Engine, which is not installed: leave it null")
    given = _given_fields(model, weights)
    _check_fields(given, weights)
    _check_division(given, model)
    gpt = kind(**{"vocab_size": weights.vocab_size, "seq_length": 1024, **_run_fields(model, trainer, given), **given})
    longest = sum(lengths.values())
    if longest > gpt.seq_length:
        raise ValueError(
            f"{' + '.join(lengths)} is {longest}, more than the model's {gpt.seq_length} positions "
            "(model.gpt.seq_length): lower them"
        )
    return gpt


def _given_fields(model: ModelConfig, weights: Weights) -> dict[str, Any]:
    """What the weights and ``model.options`` say of the configuration."""
    given = dict(weights.gpt_config)
    check_names(given, PackedGPTConfig, "model.gpt")
    own_keys = {item.name: f"model.{item.name}" for item in dataclasses.fields(ModelConfig)} | _OWN_KEYS
    for name, key in own_keys.items():
        for section, fields in {"gpt": model.gpt, "options": model.options}.items():
            if name in (fields or {}):
                raise ValueError(f"model.{section}.{name} has a key of its own: set {key}")
    check_names(model.options, PackedGPTConfig, "model.options")
    if model.virtual_pipeline_model_parallel_size is not None:
        for name, value in INTERLEAVED.items():
            for section, fields in {"gpt": weights.gpt_config, "options": model.options}.items():
                if fields.get(name, value) != value:
                    raise ValueError(
                        f"model.{section}.{name}={fields[name]} exchanges micro-batches between virtual stages: leave "
                        "it out, or set model.virtual_pipeline_model_parallel_size=null"
                    )
    for name, value in model.options.items():
        if given.setdefault(name, value) != value:
            raise ValueError(
                f"model.options.{name}={value} contradicts the model's {name}={given[name]}: options say how a model "
                "is run, not what it is"
            )
    return given


def _check_fields(given: Mapping[str, Any], weights: Weights) -> None:
    """ValueError for a model that is not complete, or not the tokenizer's."""
    if given.get("vocab_size", weights.vocab_size) != weights.vocab_size:
        raise ValueError(f"model.gpt.vocab_size must be the tokenizer's {weights.vocab_size}: leave it out")
    for needed in ("num_layers", "hidden_size", "num_attention_heads"):
        if not given.get(needed):
            raise ValueError(f"model.gpt.{needed} is needed: set model.restore_from, or describe a model in model.gpt")


def _check_division(given: Mapping[str, Any], model: ModelConfig) -> None:
    """ValueError where the model's width does not divide over its heads, or the model over the ranks."""
    heads, groups = given["num_attention_heads"], given.get("num_query_groups") or given["num_attention_heads"]
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if heads % tensor or groups % tensor:
        raise ValueError(
            f"model.tensor_model_parallel_size ({tensor}) must divide the {heads} attention heads and the {groups} "
            "key-value heads"
        )
    stages = pipeline * (model.virtual_pipeline_model_parallel_size or 1)
    if given["num_layers"] % stages:
        raise ValueError(
            f"the {given['num_layers']} layers do not divide over {stages} stages: change "
            "model.pipeline_model_parallel_size or model.virtual_pipeline_model_parallel_size"
        )
    if given["hidden_size"] % heads and not given.get("kv_channels"):
        raise ValueError(f"model.gpt.hidden_size ({given['hidden_size']}) must be a multiple of the {heads} heads")


def provide_fused_rotary() -> None:
    """Gives Megatron ours on a card where nobody else's is there."""
    if torch.cuda.is_available() and lacks_fused_rotary():
        kernel = _rotary_kernel(torch.device("cuda", torch.cuda.current_device()))
        if kernel is not None:
            give_fused_rotary(kernel.apply_rotary)


@functools.cache
def _rotary_kernel(device: torch.device) -> Any:
    otherwise = "rotary embeddings go by many small operations"
    return working("nemo_brain.model.rotary_kernel", lambda kernel: kernel.problem(device), otherwise)


def _run_fields(model: ModelConfig, trainer: RanksConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """How the model that ``given`` describes is run here, unless it says so itself."""
    provide_fused_rotary()
    fields: dict[str, Any] = {
        "params_dtype": weights_dtype(trainer),
        "pipeline_dtype": weights_dtype(trainer),
        **gpt_options(model.virtual_pipeline_model_parallel_size is not None, given),
    }
    if model.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        fields["recompute_granularity"] = "selective"
    return fields


def export_for(
    key: str, directory: str | None, gpt: PackedGPTConfig, weights: Weights, stop_token_ids: Sequence[int]
) -> MappedExport | None:
    """How the model will be written to the directory that ``key`` names; None: nowhere.

    Args:
        stop_token_ids: what ends its outputs.

    Raises:
        ValueError: that will not be possible.
    """
    if directory is None:
        return None
    export = make_export(gpt, weights.vocab_size, weights.tokenizer, key, weights.generation_config, stop_token_ids)
    check_target(directory, key)
    return export


def model_stop(weights: Weights, template: str | None) -> Stop:
    """What ends the outputs of a model by its own files. ValueError: nothing does."""
    return choose_stop(weights.tokenizer, weights.stop_token_ids, template, vocab_size=weights.vocab_size)


def rollout_stop(weights: Weights, rollout: OutputsConfig, template: str | None) -> Stop:
    """What ends the outputs of a model, by its own files or the keys of ``rollout``. ValueError: nothing does."""
    return choose_stop(
        weights.tokenizer,
        () if rollout.stop_token_ids is not None else weights.stop_token_ids,
        template,
        token_ids=rollout.stop_token_ids,
        strings=rollout.stop_strings,
        vocab_size=weights.vocab_size,
        key="rollout.stop_token_ids",
    )


def weights_dtype(trainer: RanksConfig) -> torch.dtype:
    """Of the weights and of what passes between pipeline stages."""
    return torch.bfloat16 if trainer.bf16 else torch.float32


def make_lora(peft: PeftConfig | None, seed: int) -> LoRA | None:
    return None if peft is None else LoRA(peft.dim, peft.alpha, tuple(peft.target_modules), seed)
