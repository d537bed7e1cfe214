"""Reward models of transformers, small, and the scores that transformers itself gives."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.rewards.protocol import compute_rewards

# Sums over a few dozen positions in fp32: padding and batching change the order of summation only.
CLOSE = {"abs": 1e-5, "rel": 0}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
PROMPTS = ["Name a colour.", "x", "Straße?", "Name a fruit, and say why you like it.", "y"]
OUTPUTS = ["blue", "", "<eos>[SEP] nö", "apple " * 12, "z"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + [chr(c) for c in range(33, 127)]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Characters as words; pairs and single texts get BERT's special tokens. It has no end token."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(4)  # as some saved tokenizers have; it must not apply
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def save_reward_model(kind: str, path: Path, pad: int | None = None) -> Path:
    """A random reward model with its tokenizer: ``llama`` (chat), ``bert`` (pairs) or ``gpt2`` (neither)."""
    torch.manual_seed(0)
    if kind == "bert":
        tokenizer = bert_tokenizer()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
        model = BertForSequenceClassification(config)
    elif kind == "llama":
        tokenizer = chat_tokenizer()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, pad_token_id=pad, **sizes)
        model = LlamaForSequenceClassification(config)
    else:
        tokenizer = byte_tokenizer()
        config = GPT2Config(vocab_size=len(tokenizer), num_labels=1, n_embd=16, n_layer=2, n_head=2, n_positions=160)
        model = GPT2ForSequenceClassification(config)
        model.score.weight.data.mul_(50)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def scores(reward, prompts=PROMPTS, outputs=OUTPUTS, metadata=None) -> list[float]:
    metadata = metadata or [{}] * len(prompts)
    return compute_rewards(reward, prompts, outputs, references=[None] * len(prompts), metadata=metadata)


@torch.no_grad()
def one_by_one(path: Path, rows: list[list[int]], types: list[list[int]] | None = None) -> list[float]:
    """transformers' own scores of rows of token ids, without padding or batches."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    extra = [{"token_type_ids": torch.tensor([t])} for t in types] if types else [{}] * len(rows)
    return [model(input_ids=torch.tensor([row]), **more).logits.item() for row, more in zip(rows, extra, strict=True)]


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def chat_ids(path: Path, messages: list[dict], output: str) -> list[int]:
    """The chat template by hand: texts are bytes, whatever they spell."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    role = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("system", "user", "assistant")}
    turns = [*messages, {"role": "assistant", "content": output}]
    return [token for m in turns for token in [role[m["role"]], *as_bytes(m["content"]), tokenizer.eos_token_id]]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]
