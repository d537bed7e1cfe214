"""GPT-NeoX, such as Pythia: from Hugging Face's names to Megatron's, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from nemo_brain.convert.fields import PLAIN, activation_fields, activation_name, refuse, require
from nemo_brain.convert.mapping import MappedExport, MappedWeights, Mapping, Module
from nemo_brain.convert.rope import rope_fields, rope_scaling

if TYPE_CHECKING:
    from nemo_brain.convert.source import CheckpointSource
    from nemo_brain.model.gpt import PackedGPTConfig

_REQUIRED = {"attention_bias": True}
_FIXED = {
    **PLAIN,
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
}


class GPTNeoXWeights(MappedWeights):
    """``Weights`` of a GPT-NeoX checkpoint.

    Raises ValueError where the checkpoint uses what Megatron would not compute alike (attention without biases, rotary
    scalings and activations that it lacks), or holds other tensors than its configuration says.
    """

    def __init__(self, source: CheckpointSource):
        rope = rope_fields("gpt_neox", source.config, default_base=10000.0, base_key="rotary_emb_base")
        config = GPTNeoXConfig.from_dict(source.config)  # fills in what config.json leaves to its defaults
        refuse("gpt_neox", config, _REQUIRED)
        parameters = source.config.get("rope_parameters") or {}
        gpt_config = {
            **_FIXED,
            **rope,
            **activation_fields("gpt_neox", "hidden_act", config.hidden_act),
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "seq_length": config.max_position_embeddings,
            "layernorm_epsilon": config.layer_norm_eps,
            "rotary_percent": parameters.get("partial_rotary_factor", config.rotary_pct),
            "parallel_residual": config.use_parallel_residual,
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
            "init_method_std": config.initializer_range,
        }
        mapping = _mapping(config.tie_word_embeddings, config.num_hidden_layers)
        # Masks and frequencies are computed; a tied output layer is the embedding.
        unused = (".attention.bias", ".attention.masked_bias", ".inv_freq", "embed_out.weight")
        super().__init__("gpt_neox", source, mapping, gpt_config, config.vocab_size, unused)


class GPTNeoXExport(MappedExport):
    """``Export`` of a Megatron GPT that computes what a GPT-NeoX computes.

    Raises ValueError for a model that it cannot express; names the field of GPTConfig.
    """

    def __init__(self, gpt: PackedGPTConfig, vocab_size: int, tokenizer: PreTrainedTokenizerFast):
        heads = gpt.num_attention_heads
        wanted = {"num_query_groups": heads, "kv_channels": gpt.hidden_size // heads}
        require("gpt_neox", gpt, {**_FIXED, **wanted})
        config = GPTNeoXConfig(
            architectures=["GPTNeoXForCausalLM"],
            vocab_size=vocab_size,
            hidden_size=gpt.hidden_size,
            intermediate_size=gpt.ffn_hidden_size,
            num_hidden_layers=gpt.num_layers,
            num_attention_heads=heads,
            hidden_act=activation_name("gpt_neox", gpt),
            max_position_embeddings=gpt.seq_length,
            layer_norm_eps=gpt.layernorm_epsilon,
            rotary_pct=gpt.rotary_percent,
            rotary_emb_base=gpt.rotary_base,
            rope_scaling=rope_scaling("gpt_neox", gpt),
            use_parallel_residual=gpt.parallel_residual,
            tie_word_embeddings=gpt.share_embeddings_and_output_weights,
            initializer_range=gpt.init_method_std,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        mapping = _mapping(gpt.share_embeddings_and_output_weights, gpt.num_layers)
        super().__init__(config, mapping, vocab_size, tokenizer)


def _mapping(tied: bool, layers: int) -> Mapping:
    outside = {
        "embedding.word_embeddings": Module(("gpt_neox.embed_in",)),
        "decoder.final_layernorm": Module(("gpt_neox.final_layer_norm",), bias=True),
    }
    if not tied:
        outside["output_layer"] = Module(("embed_out",))
    names = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",  # interleaved head by head, as Megatron does
        "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    }
    inside = {ours: Module((theirs,), bias=True) for ours, theirs in names.items()}
    return Mapping(outside, inside, "gpt_neox.layers.", layers)
