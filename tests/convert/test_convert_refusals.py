"""What would be computed differently on the other side is refused by its name; what only looks like it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from architectures import CONFIGS, LLAMA3_ROPE, VOCAB, random_model

from nemo_brain.convert.export import make_export
from nemo_brain.convert.open import open_weights
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.model.gpt import PackedGPTConfig

WINDOW = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}


@pytest.fixture
def saved(tmp_path) -> Callable[[str], Path]:
    """A model's directory by its name."""

    def save(name: str) -> Path:
        path = tmp_path / f"saved {name}"
        if not path.exists():
            random_model(CONFIGS[name]).save_pretrained(path)
        return path

    return save


def edited(path: Path, target: Path, changes: dict) -> Path:
    """A copy of the model with other values in config.json; None removes a key."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("mistral", {"sliding_window": 32}, r"^mistral: sliding_window=32 is less than max_position_embeddings=64"),
        (
            "qwen2",
            {**WINDOW, "layer_types": None, "max_window_layers": 2},
            r"=8 is",
        ),
        ("qwen2", {**WINDOW, "max_window_layers": 4}, None),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, None),
        (
            "qwen3",
            {"attention_bias": True},
            r"^qwen3: attention_bias=True is not supported: Megatron has biases in",
        ),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            r"^qwen3: rope_scaling of type 'yarn'",
        ),
        ("gpt_neox", {"attention_bias": False}, r"^gpt_neox: attention_bias=False is not supported, only True"),
        ("gpt_neox", {"hidden_act": "quick_gelu"}, r"^gpt_neox: hidden_act='quick_gelu' is not supported"),
        ("gpt_neox", {"num_hidden_layers": 3}, r"^gpt_neox: 12 tensors have no place in the model"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            r"^gpt2: scale_attn_by_inverse_layer_idx=True is not",
        ),
        ("gpt2", {"scale_attn_weights": False}, r"^gpt2: scale_attn_weights=False is not supported, only True"),
        ("gpt2", {"n_layer": 5}, r"^gpt2: the checkpoint lacks 12 tensors, the first transformer\.h\.4\."),
    ],
)
def test_what_megatron_would_compute_differently_is_named(saved, tmp_path, name, changes, match):
    path = edited(saved(name), tmp_path / "edited", changes)
    if match is None:
        assert open_weights(path).gpt_config == open_weights(saved(name)).gpt_config
        return
    with pytest.raises(ValueError, match=match):
        open_weights(path)


def test_configurations_of_transformers_5_are_read(saved, tmp_path):
    """They hold rotary settings in rope_parameters."""
    neox = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500, "partial_rotary_factor": 0.5}
    llama3 = {**LLAMA3_ROPE, "rope_theta": 500.0}
    for name, parameters in (("gpt_neox, sequential", neox), ("llama3 rope", llama3)):
        gone = dict.fromkeys(("rotary_pct", "rotary_emb_base", "rope_theta", "rope_scaling", "partial_rotary_factor"))
        path = edited(saved(name), tmp_path / name, {"rope_parameters": parameters, **gone})
        assert open_weights(path).gpt_config == open_weights(saved(name)).gpt_config


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("gpt_neox", {"num_query_groups": 2}, r"gpt_neox cannot express num_query_groups=2, only 4"),
        ("gpt_neox", {"kv_channels": 12}, r"gpt_neox cannot express kv_channels=12, only 8"),
        ("gpt2", {"num_query_groups": 2}, r"gpt2 cannot express num_query_groups=2, only 4"),
        ("gpt2", {"parallel_residual": True}, r"gpt2 cannot express parallel_residual=True, only False"),
        ("qwen3", {"add_bias_linear": True}, r"qk_layernorm=True with add_bias_linear=True"),
        (
            "llama3 rope",
            {"seq_len_interpolation_factor": 2.0},
            r"both seq_len_interpolation_factor=2\.0 and scale_",
        ),
    ],
)
def test_what_no_architecture_expresses_is_named(saved, name, change, match):
    config = PackedGPTConfig(**{**open_weights(saved(name)).gpt_config, **change}, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=match):
        make_export(config, VOCAB, byte_tokenizer(), "test")


DAMAGE = {
    "config.json cut off": (
        "config.json",
        lambda content: content[:-9],
        r"config\.json is no JSON: .* \(copy it again",
    ),
    "config.json a list": ("config.json", lambda content: b"[1]", r"config\.json holds no JSON object"),
    "weights cut off": ("model.safetensors", lambda content: content[:-9], r"model\.safetensors is damaged or cut off"),
    "weights empty": ("model.safetensors", lambda content: b"", r"model\.safetensors is damaged or cut off"),
    "weights of other kind": ("model.safetensors", lambda content: b"PK" * 99, r"model\.safetensors is damaged or cut"),
    "index without map": ("model.safetensors.index.json", lambda content: b"{}", r"index\.json has no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_named_with_its_file(saved, tmp_path, damage):
    name, spoil, match = DAMAGE[damage]
    path = Path(shutil.copytree(saved("llama3 rope"), tmp_path / "damaged"))
    file = path / name
    if not file.exists():  # the index, which is read where there is no single file
        (path / "model.safetensors").rename(file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=match):
        open_weights(path)


def test_a_gguf_file_that_is_cut_off_is_named(tmp_path):
    for content in (b"", b"GGUF", b"GGUF" + bytes(99), b"no gguf at all"):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.gguf"):
            open_weights(file)
