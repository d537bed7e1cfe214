"""Padding changes no score: of transformers' reward models in batches, and of exported ones by transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_tokenizers import TOKENIZERS
from models import tensors_of
from safetensors.torch import load_file
from scored_models import CLOSE, one_by_one, scores
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from nemo_brain.convert.export import Writer, make_export
from nemo_brain.convert.open import open_weights
from nemo_brain.convert.reward import PADDING, RewardExport, open_reward_model
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.reward_head import HEAD
from nemo_brain.rewards.huggingface import HuggingFaceReward
from nemo_brain.rewards.megatron import same_tokenizer

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
KINDS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "gpt_neox"), LLAMA),
    **dict.fromkeys(("gpt2", "gptj", "gpt_bigcode", "openai-gpt", "ctrl"), GPT2),
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "opt": {**LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "biogpt": LLAMA,
    "bert": LLAMA,
}
PROMPTS = ["Name a colour.", "x", "Say why.", "y"]
OUTPUTS = ["blue", "", "because of the apples", "z"]


@pytest.mark.parametrize("pad", [None, -1, 257, 256, 258, 2**31], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_batched_scores_are_those_of_single_rows(kind, pad, tmp_path):
    """Also where config.json names a padding token that is none (it is no token of the vocabulary) or ends a row."""
    torch.manual_seed(0)
    inside = pad if pad is None or 0 <= pad < 258 else None
    more = {"rotary_dim": 4} if kind == "gptj" else {}
    config = AutoConfig.for_model(kind, vocab_size=258, num_labels=1, **KINDS[kind], **more)
    config.pad_token_id = inside if kind != "bert" or inside is not None else 0
    if hasattr(config, "max_position_embeddings") and "n_positions" not in KINDS[kind]:
        config.max_position_embeddings = 128
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    rows = [[*f"{p}|{o}".encode(), 256] for p, o in zip(PROMPTS, OUTPUTS, strict=True)]
    expected = one_by_one(tmp_path, rows)
    assert len({round(score, 3) for score in expected}) == len(rows)
    written = AutoConfig.from_pretrained(tmp_path)
    written.pad_token_id = pad if kind != "bert" or pad is not None else 0
    written.save_pretrained(tmp_path)
    options = {"template": "{prompt}|{output}", "append_end_token": True, "max_tokens": 100}
    for batch_tokens in (1, 10_000):
        reward = HuggingFaceReward(str(tmp_path), batch_tokens=batch_tokens, **options)
        assert scores(reward, PROMPTS, OUTPUTS) == pytest.approx(expected, **CLOSE)


def with_padding(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    other.pad_token = getattr(other, f"{name}_token")
    return other


# The tokenizer; tokens that end outputs besides its own; rows of the embedding behind its last token; what is added.
TOKENIZER = {
    "its own padding": (byte_tokenizer(), [], 0, 0),
    "its padding ends outputs": (byte_tokenizer(), [257], 0, 1),
    "none": (TOKENIZERS["chatml"], [], 0, 1),
    "none, and unused rows": (TOKENIZERS["chatml"], [], 7, 0),
    "the unknown token": (with_padding(TOKENIZERS["llama"], "unk"), [], 0, 1),
    "the end token": (with_padding(TOKENIZERS["phi"], "eos"), [], 0, 1),
    "the start token": (with_padding(TOKENIZERS["llama"], "bos"), [], 3, 0),
}
ARCHITECTURES = {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig, "gpt2": GPT2Config}


def exported(directory: Path, tokenizer, ends: list[int], rows: int, kind: type) -> tuple[Path, torch.Tensor]:
    """A random language model's trunk with a head, as a reward model; and the embedding that the model had."""
    torch.manual_seed(1)
    own = tokenizer.eos_token_id
    sizes = GPT2 if kind is GPT2Config else {**LLAMA, "max_position_embeddings": 128}
    config = kind(vocab_size=len(tokenizer) + rows, eos_token_id=own, tie_word_embeddings=True, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory / "trunk")
    tokenizer.save_pretrained(directory / "trunk")
    weights = open_weights(directory / "trunk")
    gpt = PackedGPTConfig(**{**weights.gpt_config, "vocab_size": weights.vocab_size})
    export = make_export(gpt, weights.vocab_size, weights.tokenizer, "test", {}, [own, *ends])
    writer = Writer(RewardExport(export, 0.0, None), directory / "reward", 10**9)
    for name in weights.names:
        writer.attempt(writer.add, name, weights.tensor(name))
    writer.attempt(writer.add, HEAD, torch.randn(1, 16))
    writer.attempt(writer.finish)
    assert writer.error is None, writer.error
    return directory / "reward", weights.tensor("embedding.word_embeddings.weight")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("case", TOKENIZER)
def test_an_exported_reward_model_scores_in_batches_as_alone_by_transformers(case, kind, tmp_path):
    """With its tokenizer's padding, whatever token ends the row; no token's embedding has changed."""
    tokenizer, ends, rows, added = TOKENIZER[case]
    path, before = exported(tmp_path, tokenizer, ends, rows, ARCHITECTURES[kind])
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    written = AutoTokenizer.from_pretrained(path)
    pad = written.pad_token_id
    assert pad == model.config.pad_token_id and (written.pad_token == PADDING) == (case != "its own padding")
    assert pad not in {tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *ends}
    texts = ["hello world", "h", "the world said hello", "x"]
    last = [tokenizer.eos_token_id, *ends, tokenizer.unk_token_id, tokenizer.bos_token_id, None]
    ids = [
        written(text, add_special_tokens=False).input_ids + [token] * (token is not None)
        for text in texts
        for token in dict.fromkeys(last)
    ]
    batch = written.pad({"input_ids": ids}, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, 0].tolist()
    assert together == pytest.approx(one_by_one(path, ids), **CLOSE)
    # The score of the last token, whatever it is: as in training.
    with torch.no_grad():
        hidden = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
        assert together == pytest.approx([float(model.score(state)) for state in hidden], **CLOSE)
    again = open_reward_model(path, "test")
    embedding = again.tensor("embedding.word_embeddings.weight", ())
    assert again.vocab_size == len(embedding) == len(before) + added
    assert torch.equal(embedding[: len(before)], before) and not embedding[len(before) :].any()
    assert len(again.tokenizer) <= again.vocab_size
    # Texts have the same tokens as before, for a run whose policy has the old tokenizer.
    assert same_tokenizer(again.tokenizer, open_weights(tmp_path / "trunk").tokenizer)


def test_a_reward_model_exported_again_stays_as_it_is(tmp_path):
    """It has a padding token of its own then: no further row."""
    tokenizer, ends, rows, _ = TOKENIZER["none"]
    path, _ = exported(tmp_path, tokenizer, ends, rows, LlamaConfig)
    weights = open_reward_model(path, "test")
    gpt = PackedGPTConfig(**{**weights.gpt_config, "vocab_size": weights.vocab_size})
    export = make_export(gpt, weights.vocab_size, weights.tokenizer, "test", {}, weights.stop_token_ids)
    writer = Writer(RewardExport(export, 0.0, None), tmp_path / "again", 10**9)
    for name in weights.trunk.names:
        writer.attempt(writer.add, name, weights.tensor(name, ()))
    writer.attempt(writer.add, HEAD, weights.head)
    writer.attempt(writer.finish)
    assert writer.error is None, writer.error
    found, expected = tensors_of(tmp_path / "again"), load_file(path / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").pad_token == PADDING
