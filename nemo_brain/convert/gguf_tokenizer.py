"""A fast tokenizer from the vocabulary, merges and special tokens that a GGUF file carries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from nemo_brain.convert.gguf import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# How text is split before merging, by tokenizer.ggml.pre (the names and expressions of llama.cpp's llama-vocab.cpp).
_PRE_TOKENIZERS = {"smollm": _digits_then_gpt2}


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template.

    Raises ValueError on tokenizers other than byte-level BPE with a known ``tokenizer.ggml.pre``: splitting text in
    another way than the model was trained with would go unnoticed.
    """
    model, split = file.field("tokenizer.ggml.model", None), file.field("tokenizer.ggml.pre", None)
    if model != "gpt2" or split not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model={model!r} with tokenizer.ggml.pre={split!r} is not supported; known: "
            f"'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}. Use the model's Hugging Face directory instead"
        )
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"):
        if file.field(key, False):
            raise ValueError(f"{file.path}: {key} is not supported. Use the model's Hugging Face directory instead")
    tokens = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, file.field("tokenizer.ggml.token_type"), strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    named = {
        "bos_token": "tokenizer.ggml.bos_token_id",
        "eos_token": "tokenizer.ggml.eos_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id",
        "pad_token": "tokenizer.ggml.padding_token_id",
    }
    ids = {name: file.field(key, None) for name, key in named.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=file.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # all that a language model's forward takes
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    )
    fast.chat_template = file.field("tokenizer.chat_template", None)
    return fast
