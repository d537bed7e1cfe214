"""Llama (and what shares its architecture, such as SmolLM2): from Hugging Face's names to Megatron's, and back.

Shapes: G query groups, R query heads per group, D channels per head, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from nemo.collections.llm.gpt.model.base import GPTConfig

    from nemo_brain.convert.weights import Source

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
# The parts that Megatron keeps in one tensor, in its order.
_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_ACTIVATIONS: dict[str, Callable] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
# What Megatron's GPT, as NeMo configures it, would compute differently: the only value that is accepted.
_REQUIRED = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}

# The way back: fields of GPTConfig for which a Llama knows one value only.
_EXPRESSIBLE = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "multi_latent_attention": False,
    "apply_residual_connection_post_layernorm": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "heterogeneous_block_specs": False,
}


class LlamaWeights:
    """``Weights`` of a Llama checkpoint.

    Raises ValueError where the checkpoint uses what Megatron would not compute alike (scaled rotary embeddings, biases,
    other activations), or holds other tensors than its configuration says.
    """

    def __init__(self, source: Source):
        self.source = source
        rotary_base = _rotary_base(source.config)
        config = LlamaConfig.from_dict(source.config)  # fills in what config.json leaves to its defaults
        for key, value in _REQUIRED.items():
            if getattr(config, key, value) != value:
                raise ValueError(f"llama: {key}={getattr(config, key)!r} is not supported, only {value!r}")
        if config.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"llama: hidden_act={config.hidden_act!r} is not supported, only {', '.join(_ACTIVATIONS)}"
            )
        self.vocab_size = config.vocab_size
        self.gpt_config = {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": config.head_dim,
            "seq_length": config.max_position_embeddings,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": _ACTIVATIONS[config.hidden_act],
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "position_embedding_type": "rope",
            "rotary_base": rotary_base,
            "rotary_percent": 1.0,
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
            "init_method_std": config.initializer_range,
            "attention_dropout": config.attention_dropout,
            "hidden_dropout": 0.0,
        }
        self._check_names()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.source.tokenizer

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The full tensor of a canonical Megatron name in the checkpoint's dtype; ValueError for other names."""
        if name in _TOP:
            return self.source.tensor(_TOP[name])
        match = _LAYER_NAME.fullmatch(name)
        if match is None or match[2] not in _LAYER or int(match[1]) >= self.gpt_config["num_layers"]:
            raise ValueError(f"{name}: a Llama checkpoint of {self.gpt_config['num_layers']} layers has no such tensor")
        parts = [self.source.tensor(f"model.layers.{match[1]}.{part}") for part in _LAYER[match[2]]]
        if len(parts) == 3:
            return self._interleave(name, *parts)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _interleave(self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Megatron's order, group by group: [G*R*D, H], [G*D, H], [G*D, H] -> [G*(R+2)*D, H]."""
        groups, channels = self.gpt_config["num_query_groups"], self.gpt_config["kv_channels"]
        rows = [self.gpt_config["num_attention_heads"] * channels, groups * channels, groups * channels]
        found = [len(part) for part in (query, key, value)]
        if found != rows:
            raise ValueError(f"{name}: queries, keys and values have {found} rows, config.json implies {rows}")
        split = [part.view(groups, -1, channels, part.shape[-1]) for part in (query, key, value)]
        return torch.cat(split, dim=1).flatten(0, 2)

    def _check_names(self) -> None:
        layers = range(self.gpt_config["num_layers"])
        expected = {f"model.layers.{layer}.{part}" for layer in layers for parts in _LAYER.values() for part in parts}
        expected |= set(_TOP.values())
        if self.gpt_config["share_embeddings_and_output_weights"]:
            expected.remove("lm_head.weight")
        names = set(self.source.names)
        if missing := sorted(expected - names):
            raise ValueError(f"llama: the checkpoint lacks {len(missing)} tensors, the first {missing[0]}")
        # Frequencies are computed from the configuration; a tied output layer is the embedding.
        unused = {name for name in names - expected if not name.endswith((".inv_freq", "lm_head.weight"))}
        if unused:
            raise ValueError(f"llama: {len(unused)} tensors have no place in the model, the first {min(unused)}")


class LlamaExport:
    """``Export`` of a Megatron GPT that computes what a Llama computes.

    Raises ValueError for a model that it cannot express; names the field of GPTConfig.
    """

    def __init__(self, gpt: GPTConfig, vocab_size: int, tokenizer: PreTrainedTokenizerFast):
        for key, value in _EXPRESSIBLE.items():
            if getattr(gpt, key, value) != value:
                raise ValueError(f"llama cannot express {key}={getattr(gpt, key)!r}, only {value!r}")
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self._groups = gpt.num_query_groups or gpt.num_attention_heads
        self._channels = gpt.kv_channels or gpt.hidden_size // gpt.num_attention_heads
        self.config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=vocab_size,
            hidden_size=gpt.hidden_size,
            intermediate_size=gpt.ffn_hidden_size,
            num_hidden_layers=gpt.num_layers,
            num_attention_heads=gpt.num_attention_heads,
            num_key_value_heads=self._groups,
            head_dim=self._channels,
            hidden_act=_hidden_act(gpt),
            max_position_embeddings=gpt.seq_length,
            rms_norm_eps=gpt.layernorm_epsilon,
            rope_theta=float(gpt.rotary_base),
            tie_word_embeddings=gpt.share_embeddings_and_output_weights,
            initializer_range=gpt.init_method_std,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def tensors(self, name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face's names and tensors of one canonical Megatron tensor, without rows that pad the vocabulary."""
        if name in _TOP:
            yield _TOP[name], full
            return
        layer, rest = _LAYER_NAME.fullmatch(name).groups()
        parts = [full]
        if len(_LAYER[rest]) == 3:
            split = full.view(self._groups, -1, self._channels, full.shape[-1])
            parts = [part.flatten(0, 2) for part in split.split([split.shape[1] - 2, 1, 1], dim=1)]
        elif len(_LAYER[rest]) == 2:
            parts = full.chunk(2)
        for part, tensor in zip(_LAYER[rest], parts, strict=True):
            yield f"model.layers.{layer}.{part}", tensor


def _hidden_act(gpt: GPTConfig) -> str:
    name = next((name for name, function in _ACTIVATIONS.items() if function is gpt.activation_func), None)
    if name is None:
        described = getattr(gpt.activation_func, "__name__", gpt.activation_func)
        raise ValueError(f"llama cannot express activation_func={described}, only {', '.join(_ACTIVATIONS)}")
    # Megatron's fused kernels approximate gelu by tanh.
    return "gelu_pytorch_tanh" if name == "gelu" and gpt.bias_activation_fusion else name


def _rotary_base(config: dict) -> float:
    # Transformers 5 writes rope_parameters where transformers 4 wrote rope_theta and rope_scaling.
    parameters = config.get("rope_parameters") or {}
    for rope in (parameters, config.get("rope_scaling") or {}):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"llama: rope_scaling of type {kind!r} is not supported: NeMo's GPTConfig cannot express it"
            )
    base = parameters.get("rope_theta", config.get("rope_theta", LlamaConfig().rope_theta))
    return int(base) if float(base).is_integer() else base
