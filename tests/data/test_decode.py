"""The text of tokens is theirs, one by one: nothing is cleaned up, and it is made in one place."""

import ast
from pathlib import Path

import pytest
from chat_tokenizers import TOKENIZERS
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nemo_brain.data.tokenizers import byte_tokenizer, decode, encode

ROOT = Path(__file__).resolve().parents[2]
CLEANED = " ! ? , . ' n't 'm 's 've 're"  # what transformers' clean-up takes the spaces from
BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}


@pytest.fixture(autouse=True, params=[True, False], ids=["cleaning", "plain"])
def _cleaning(request, monkeypatch):
    for tokenizer in TOKENIZERS.values():
        monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", request.param)


def ids(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids, and some without a token; and words between which a clean-up would take spaces."""
    tokenizer = TOKENIZERS[name]
    words = st.lists(st.sampled_from([" !", " ,", " n't", "ok", " ", "é"]), max_size=9)
    return st.lists(st.integers(0, len(tokenizer) + 3), max_size=40) | words.map(
        lambda parts: encode(tokenizer, "".join(parts))
    )


@given(ids("chatml"))
def test_byte_level_text_is_the_utf8_of_all_tokens_bytes(tokens):
    """Added tokens are spelled; characters that are split over tokens come together."""
    tokenizer = TOKENIZERS["chatml"]
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    spelled = [added.get(i) or bytes(BYTES[c] for c in tokenizer.convert_ids_to_tokens(i) or "") for i in tokens]
    assert decode(tokenizer, tokens) == b"".join(spelled).decode("utf-8", errors="replace")


@given(ids("phi"))
def test_metaspace_text_is_the_pieces_with_spaces(tokens):
    tokenizer = TOKENIZERS["phi"]
    pieces = [tokenizer.convert_ids_to_tokens(i) or "" for i in tokens]
    assert decode(tokenizer, tokens) == "".join(pieces).replace("▁", " ")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_text_is_what_the_tokenizers_library_makes_of_the_tokens(name, data):
    tokens = data.draw(ids(name))
    expected = TOKENIZERS[name].backend_tokenizer.decode(tokens, skip_special_tokens=False)
    assert decode(TOKENIZERS[name], tokens) == expected


def test_what_a_clean_up_would_change_is_kept():
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokens = [*CLEANED.encode(), 257, 256]
    assert decode(tokenizer, tokens) == CLEANED + "<pad><eos>" != tokenizer.decode(tokens)


def decodes(tree: ast.AST) -> list[str]:
    """The calls that make text of token ids; ``bytes.decode`` takes nothing, or the name of an encoding."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            encoding = all(isinstance(argument, ast.Constant) for argument in node.args)
            if node.func.attr == "decode" and not encoding:
                found.append(ast.unparse(node))
            if node.func.attr in ("batch_decode", "convert_tokens_to_string"):
                found.append(ast.unparse(node))
    return found


def test_tokens_become_text_in_one_place():
    files = [file for room in ("nemo_brain", "examples") for file in (ROOT / room).rglob("*.py")]
    found = {file.name: calls for file in files if (calls := decodes(ast.parse(file.read_text(encoding="utf-8"))))}
    assert list(found) == ["tokenizers.py"] and len(found["tokenizers.py"]) == 1, found
    assert decodes(ast.parse("x.tokenizer.decode(ids[:3], skip_special_tokens=False)"))
    assert not decodes(ast.parse("x.decode('utf-8'), x.decode(errors='replace')"))
