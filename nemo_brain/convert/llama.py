"""Llama and its siblings Mistral, Qwen2 and Qwen3, and what shares their architecture, such as SmolLM2: both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from nemo_brain.convert.fields import PLAIN, activation_fields, activation_name, refuse, require
from nemo_brain.convert.mapping import Heads, MappedExport, MappedWeights, Mapping, Module
from nemo_brain.convert.rope import rope_fields, rope_scaling

if TYPE_CHECKING:
    from nemo_brain.convert.source import CheckpointSource
    from nemo_brain.model.gpt import PackedGPTConfig

_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Which of them has which biases and norms, as Megatron knows them: (add_bias_linear, add_qkv_bias, qk_layernorm).
_KINDS = {
    (False, False, False): "llama",
    (True, False, False): "llama",
    (False, True, False): "qwen2",
    (False, False, True): "qwen3",
}
# Keys of config.json for which Megatron's GPT computes what the model computes with one value only.
_REQUIRED = {"partial_rotary_factor": 1.0, "rope_interleaved": False}
_FIXED = {
    **PLAIN,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "parallel_residual": False,
}


class LlamaWeights(MappedWeights):
    """``Weights`` of a checkpoint of a model_type in ``_CONFIGS``.

    Raises ValueError where the checkpoint uses what Megatron would not compute alike (rotary scalings and activations
    that it lacks, biases in attention or MLP alone, attention windows), or holds other tensors than its configuration
    says.
    """

    def __init__(self, source: CheckpointSource):
        kind = source.config["model_type"]
        rope = rope_fields(kind, source.config, default_base=10000.0)
        config = _CONFIGS[kind].from_dict(source.config)  # fills in what config.json leaves to its defaults
        refuse(kind, config, _REQUIRED)
        _refuse_windows(kind, config)
        bias = _has_biases(kind, config)
        groups = config.num_key_value_heads
        channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        gpt_config = {
            **_FIXED,
            **rope,
            **activation_fields(kind, "hidden_act", config.hidden_act),
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": groups,
            "kv_channels": channels,
            "seq_length": config.max_position_embeddings,
            "layernorm_epsilon": config.rms_norm_eps,
            "add_bias_linear": bias,
            "add_qkv_bias": kind == "qwen2",
            "qk_layernorm": kind == "qwen3",
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
            "init_method_std": config.initializer_range,
        }
        heads = Heads(groups, config.num_attention_heads // groups, channels)
        mapping = _mapping(
            heads, bias, kind == "qwen2", kind == "qwen3", config.tie_word_embeddings, config.num_hidden_layers
        )
        # Frequencies are computed from the configuration; a tied output layer is the embedding.
        unused = (".inv_freq", "lm_head.weight")
        super().__init__(kind, source, mapping, gpt_config, config.vocab_size, unused)


class LlamaExport(MappedExport):
    """``Export`` of a Megatron GPT that computes what a Llama, a Qwen2 or a Qwen3 computes.

    Raises ValueError for a model that none of them can express; names the field of GPTConfig.
    """

    def __init__(self, gpt: PackedGPTConfig, vocab_size: int, tokenizer: PreTrainedTokenizerFast):
        require("llama", gpt, _FIXED)
        # Biases everywhere include those of queries, keys and values.
        extras = (gpt.add_bias_linear, gpt.add_qkv_bias and not gpt.add_bias_linear, gpt.qk_layernorm)
        if extras not in _KINDS:
            raise ValueError(
                f"llama cannot express qk_layernorm={gpt.qk_layernorm!r} with add_bias_linear={gpt.add_bias_linear!r} "
                f"and add_qkv_bias={gpt.add_qkv_bias!r}, only without biases"
            )
        kind = _KINDS[extras]
        groups = gpt.num_query_groups or gpt.num_attention_heads
        channels = gpt.kv_channels or gpt.hidden_size // gpt.num_attention_heads
        heads = Heads(groups, gpt.num_attention_heads // groups, channels)
        own = {}
        if kind == "llama":
            own = {"attention_bias": gpt.add_bias_linear, "mlp_bias": gpt.add_bias_linear}
        if kind != "qwen2" or channels * gpt.num_attention_heads != gpt.hidden_size:
            own["head_dim"] = channels
        config = _CONFIGS[kind](
            architectures=[_CLASSES[kind]],
            vocab_size=vocab_size,
            hidden_size=gpt.hidden_size,
            intermediate_size=gpt.ffn_hidden_size,
            num_hidden_layers=gpt.num_layers,
            num_attention_heads=gpt.num_attention_heads,
            num_key_value_heads=groups,
            hidden_act=activation_name(kind, gpt),
            max_position_embeddings=gpt.seq_length,
            rms_norm_eps=gpt.layernorm_epsilon,
            rope_theta=float(gpt.rotary_base),
            rope_scaling=rope_scaling(kind, gpt),
            tie_word_embeddings=gpt.share_embeddings_and_output_weights,
            initializer_range=gpt.init_method_std,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **own,
        )
        mapping = _mapping(heads, *extras, gpt.share_embeddings_and_output_weights, gpt.num_layers)
        super().__init__(config, mapping, vocab_size, tokenizer)


def _mapping(heads: Heads, bias: bool, qkv_bias: bool, qk_norm: bool, tied: bool, layers: int) -> Mapping:
    outside = {
        "embedding.word_embeddings": Module(("model.embed_tokens",)),
        "decoder.final_layernorm": Module(("model.norm",)),
    }
    if not tied:
        outside["output_layer"] = Module(("lm_head",))
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    inside = {
        "input_layernorm": Module(("input_layernorm",)),
        "self_attention.linear_qkv": Module(qkv, bias or qkv_bias, heads=heads),
        "self_attention.linear_proj": Module(("self_attn.o_proj",), bias),
        "pre_mlp_layernorm": Module(("post_attention_layernorm",)),
        "mlp.linear_fc1": Module(("mlp.gate_proj", "mlp.up_proj"), bias),
        "mlp.linear_fc2": Module(("mlp.down_proj",), bias),
    }
    if qk_norm:
        inside["self_attention.q_layernorm"] = Module(("self_attn.q_norm",))
        inside["self_attention.k_layernorm"] = Module(("self_attn.k_norm",))
    return Mapping(outside, inside, "model.layers.", layers)


def _has_biases(kind: str, config: PretrainedConfig) -> bool:
    """Megatron has biases in all linear layers, or in queries, keys and values alone."""
    attention, mlp = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    if kind == "llama" and attention == mlp:
        return attention
    for key, value in (("attention_bias", attention), ("mlp_bias", mlp)):
        # transformers' Mistral and Qwen2 do not look at these keys.
        if value and kind in ("llama", "qwen3"):
            others = " without the other of attention_bias and mlp_bias" if kind == "llama" else ""
            raise ValueError(
                f"{kind}: {key}=True is not supported{others}: Megatron has biases in all linear layers, or in "
                "queries, keys and values alone"
            )
    return False


def _refuse_windows(kind: str, config: PretrainedConfig) -> None:
    window = getattr(config, "sliding_window", None) if kind != "llama" else None
    layers = getattr(config, "layer_types", None)
    if window is None or (layers is not None and "sliding_attention" not in layers):
        return
    if window < config.max_position_embeddings:
        raise ValueError(
            f"{kind}: sliding_window={window} is less than max_position_embeddings={config.max_position_embeddings}: "
            f"attention windows are not supported. To use the model within one window set max_position_embeddings to "
            f"{window} in its config.json"
        )
