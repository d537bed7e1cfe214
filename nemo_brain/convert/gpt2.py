"""GPT-2: from Hugging Face's names to Megatron's, and back. Its matrices are stored as [in, out]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import GPT2Config, PreTrainedTokenizerFast

from nemo_brain.convert.fields import PLAIN, activation_fields, activation_name, gelu_tanh, refuse, require
from nemo_brain.convert.mapping import Heads, MappedExport, MappedWeights, Mapping, Module

if TYPE_CHECKING:
    from nemo_brain.convert.source import CheckpointSource
    from nemo_brain.model.gpt import PackedGPTConfig

_PREFIX = "transformer."
_REQUIRED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
_FIXED = {
    **PLAIN,
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "parallel_residual": False,
}


class GPT2Weights(MappedWeights):
    """``Weights`` of a GPT-2 checkpoint, saved with its output layer or, as the published ones are, without.

    Raises ValueError where the checkpoint uses what Megatron would not compute alike (other scalings of the attention
    scores, cross attention, activations that it lacks), or holds other tensors than its configuration says.
    """

    def __init__(self, source: CheckpointSource):
        config = GPT2Config.from_dict(source.config)  # fills in what config.json leaves to its defaults
        refuse("gpt2", config, _REQUIRED)
        gpt_config = {
            **_FIXED,
            **activation_fields("gpt2", "activation_function", config.activation_function),
            "num_layers": config.n_layer,
            "hidden_size": config.n_embd,
            "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
            "num_attention_heads": config.n_head,
            "seq_length": config.n_positions,
            "layernorm_epsilon": config.layer_norm_epsilon,
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
            "init_method_std": config.initializer_range,
        }
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in source.names) else ""
        heads = Heads(config.n_head, 1, config.n_embd // config.n_head)
        mapping = _mapping(heads, config.tie_word_embeddings, config.n_layer, prefix)
        # Masks are computed; a tied output layer is the embedding.
        unused = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
        super().__init__("gpt2", source, mapping, gpt_config, config.vocab_size, unused)


class GPT2Export(MappedExport):
    """``Export`` of a Megatron GPT that computes what a GPT-2 computes.

    Raises ValueError for a model that it cannot express; names the field of GPTConfig.
    """

    def __init__(self, gpt: PackedGPTConfig, vocab_size: int, tokenizer: PreTrainedTokenizerFast):
        heads = Heads(gpt.num_attention_heads, 1, gpt.hidden_size // gpt.num_attention_heads)
        require("gpt2", gpt, {**_FIXED, "num_query_groups": heads.groups, "kv_channels": heads.channels})
        config = GPT2Config(
            architectures=["GPT2LMHeadModel"],
            vocab_size=vocab_size,
            n_embd=gpt.hidden_size,
            n_inner=gpt.ffn_hidden_size,
            n_layer=gpt.num_layers,
            n_head=gpt.num_attention_heads,
            n_positions=gpt.seq_length,
            activation_function="gelu_new" if gpt.activation_func is gelu_tanh else activation_name("gpt2", gpt),
            layer_norm_epsilon=gpt.layernorm_epsilon,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=gpt.share_embeddings_and_output_weights,
            initializer_range=gpt.init_method_std,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        mapping = _mapping(heads, gpt.share_embeddings_and_output_weights, gpt.num_layers, _PREFIX)
        super().__init__(config, mapping, vocab_size, tokenizer)


def _mapping(heads: Heads, tied: bool, layers: int, prefix: str) -> Mapping:
    outside = {
        "embedding.word_embeddings": Module((f"{prefix}wte",)),
        "embedding.position_embeddings": Module((f"{prefix}wpe",)),
        "decoder.final_layernorm": Module((f"{prefix}ln_f",), bias=True),
    }
    if not tied:
        outside["output_layer"] = Module(("lm_head",))
    inside = {
        "input_layernorm": Module(("ln_1",), bias=True),
        "self_attention.linear_qkv": Module(("attn.c_attn",), bias=True, transposed=True, heads=heads),
        "self_attention.linear_proj": Module(("attn.c_proj",), bias=True, transposed=True),
        "pre_mlp_layernorm": Module(("ln_2",), bias=True),
        "mlp.linear_fc1": Module(("mlp.c_fc",), bias=True, transposed=True),
        "mlp.linear_fc2": Module(("mlp.c_proj",), bias=True, transposed=True),
    }
    return Mapping(outside, inside, f"{prefix}h.", layers)
