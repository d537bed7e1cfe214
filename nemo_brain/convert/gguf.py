"""A GGUF file (llama.cpp's format) in Hugging Face's terms: configuration, tensors dequantised on demand, tokenizer."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerFast

from nemo_brain.convert.gguf_tokenizer import build_tokenizer
from nemo_brain.convert.source import check_finite

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_NO_DEFAULT = object()
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


class GGUFFile:
    """One .gguf file of the llama architecture.

    Args:
        path: the file.
        finite_unless: see ``open_weights``.

    Raises ValueError on other architectures, tensors without a Hugging Face name (rotary scaling, biases, experts) and
    tokenizers whose splitting is not known here.
    """

    def __init__(self, path: Path, finite_unless: str | None):
        self.path = path
        self._finite_unless = finite_unless
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: not a readable GGUF file: {error}") from error
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: GGUF architecture {architecture!r} is not supported; known: llama")
        self._tensors = {self._hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.config = self._config()
        self.generation_config: dict = {}

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self)

    def field(self, key: str, default: Any = _NO_DEFAULT) -> Any:
        """The value of one metadata key. Raises ValueError where it is absent and has no default."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is _NO_DEFAULT:
            raise ValueError(f"{self.path}: the metadata lacks {key}")
        return default

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a Hugging Face name, dequantised to fp32. ValueError: it cannot be, or is not finite."""
        stored = self._tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: {stored.name}: {stored.tensor_type.name} cannot be dequantised") from error
        # GGUF states the fastest dimension first.
        tensor = torch.from_numpy(np.array(values, dtype=np.float32)).view(*stored.shape.tolist()[::-1])
        check_finite(tensor, f"{self.path}: {stored.name}", self._finite_unless)
        if name.endswith("q_proj.weight"):
            return _unpermute(tensor, self.config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return _unpermute(tensor, self.config["num_key_value_heads"])
        return tensor

    def _config(self) -> dict:
        """The keys of config.json."""
        heads, hidden = self.field("llama.attention.head_count"), self.field("llama.embedding_length")
        groups = self.field("llama.attention.head_count_kv", heads)
        if not isinstance(heads, int) or not isinstance(groups, int):
            raise ValueError(f"{self.path}: numbers of attention heads that differ between layers are not supported")
        channels = self.field("llama.attention.key_length", hidden // heads)
        required = {
            "llama.expert_count": 0,
            "llama.rope.scaling.type": "none",
            "llama.rope.scale_linear": 1.0,
            "llama.rope.dimension_count": channels,
            "llama.attention.value_length": channels,
        }
        for key, value in required.items():
            if (found := self.field(key, value)) != value:
                raise ValueError(f"{self.path}: {key}={found!r} is not supported, only {value!r}")
        return {
            "model_type": "llama",
            "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": channels,
            "max_position_embeddings": self.field("llama.context_length"),
            "rms_norm_eps": self.field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.field("llama.rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "eos_token_id": [token for key in _ENDS if (token := self.field(key, None)) is not None],
        }

    def _hugging_face_name(self, name: str) -> str:
        match = _LAYER_NAME.fullmatch(name)
        if match and match[2] in _LAYER:
            return f"model.layers.{match[1]}.{_LAYER[match[2]]}"
        if name in _TOP:
            return _TOP[name]
        raise ValueError(f"{self.path}: tensor {name} is not part of a plain Llama and would be lost")


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels, Hugging Face and Megatron channel i with i + D/2: rows are put back."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
