"""Random models of every architecture that can be converted, over bytes."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nemo_brain.core.groups import Group, Output, Prompt

VOCAB = 258  # the byte tokenizer's; padded in every layout
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=500.0,
    rms_norm_eps=1e-3,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
NEOX = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    layer_norm_eps=1e-3,
)
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64, layer_norm_epsilon=1e-3)
CONFIGS: dict[str, PretrainedConfig] = {
    # Wavelengths of 6 to 1500 positions: some are kept, some scaled, some between.
    "llama3 rope": LlamaConfig(**LLAMA, head_dim=16, rope_scaling=LLAMA3_ROPE),
    "llama, linear rope, biases": LlamaConfig(
        **LLAMA, rope_scaling={"rope_type": "linear", "factor": 2.5}, attention_bias=True, mlp_bias=True
    ),
    "mistral": MistralConfig(**LLAMA, sliding_window=64, hidden_act="gelu_pytorch_tanh"),
    "qwen2": Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA, head_dim=12),
    "gpt_neox": GPTNeoXConfig(**NEOX, rotary_pct=0.25, use_parallel_residual=True),
    "gpt_neox, sequential": GPTNeoXConfig(
        **NEOX,
        rotary_pct=0.5,
        rotary_emb_base=500,
        use_parallel_residual=False,
        hidden_act="gelu_fast",
        tie_word_embeddings=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
    "gpt2": GPT2Config(**GPT2),
    "gpt2, untied": GPT2Config(**GPT2, n_inner=40, activation_function="relu", tie_word_embeddings=False),
}
TOKENS = torch.arange(40) * 37 % 256
PROMPT = Prompt("p", "a prompt", list(b"a prompt"))
# The longest row takes 64 positions' worth of different rotations with the prompt before it.
OUTPUTS = [Output([*text.encode(), 256], text, True) for text in ("one output", "", "another, which is longer" * 2)]
GROUPS = [Group(PROMPT, OUTPUTS), Group(Prompt("q", "q", list(b"qed")), OUTPUTS[:2])]


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Every tensor, biases and norms included, is drawn at random and changes the logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model
