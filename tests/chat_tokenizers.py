"""Tokenizers with chat templates, conversations, and values as a careless file may have them."""

from __future__ import annotations

import string

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nemo_brain.data.stop import Stop
from nemo_brain.data.tokenizers import byte_tokenizer

CORPUS = ["user\nhello world, the assistant said hello\n\n  two words <think> [INST] <|im s im_end end|> eos </s"] * 4


def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as Qwen has it; one added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|im_end|>x"])
    backend.add_tokens(["<think>"])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def llama() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: a word prefix at the start of the text alone, byte fallback, BOS; special tokens in the
    vocabulary, two of them reachable by merges."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁helowrdINST[]/<>s", "he", "ll", "▁h", "▁w", "</", "s>", "<s"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("h", "e"), ("l", "l"), ("▁", "h"), ("▁", "w"), ("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **specials)


def phi() -> PreTrainedTokenizerFast:
    """Unigram with a control piece of the best score in the vocabulary; role tokens that the template builds from
    pieces, and that swallow the white space behind them."""
    letters = "▁abcdehilmnorstuvwxyz<>|/\n"
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters), ("he", -2.0), ("ll", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    backend.add_special_tokens([AddedToken(f"<|{role}|>", rstrip=True) for role in ("user", "assistant", "system")])
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>' }}{% endfor %}{{ '<|assistant|>' }}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=template
    )


TOKENIZERS = {"chatml": chatml(), "llama": llama(), "phi": phi()}


END = 256
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def own_stop(tokenizer: PreTrainedTokenizerFast) -> Stop:
    """The tokenizer's end token alone ends outputs."""
    return Stop((tokenizer.eos_token_id,), end=tokenizer.eos_token_id)


USER = {"role": "user", "content": "What colour?"}
BLUE, RED = ({"role": "assistant", "content": colour} for colour in ("Blue.", "Red."))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(string.printable, max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)
