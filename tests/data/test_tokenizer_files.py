"""Tokenizers from files as transformers 5 writes them, and from files that do not fit: the ids are tokenizer.json's."""

import ast
import json
import warnings
from pathlib import Path

import pytest
from chat_tokenizers import chatml, llama
from safetensors.torch import save_file
from tokenizer_files import CHAT, SPECIAL, V5, backend, write
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

from nemo_brain.convert.huggingface import HuggingFaceDirectory
from nemo_brain.convert.open import start_weights
from nemo_brain.data.templates import Template
from nemo_brain.data.tokenizers import byte_tokenizer, encode, load_tokenizer, start_tokens

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["hello world", " hello", "Hé \n w  x ,", "<|eot|>a", "a <think> </s>hello ", "<|turn|> x<img>"]
AGAIN = {"is_local": True, "local_files_only": False}  # of what version 5 has read and written once more
ADDED = {"content": "<|eot|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
DECODER = {str(256 + i): {**ADDED, "content": token, "special": True} for i, token in enumerate(SPECIAL)}

FILES = {
    "a list": V5 | {"extra_special_tokens": ["<|eot|>", "<|turn|>"]},
    "written again": V5 | AGAIN | {"extra_special_tokens": ["<|eot|>"]},
    "tokens as objects": V5 | {"extra_special_tokens": [{"__type": "AddedToken", "special": True, **ADDED}]},
    "both lists": V5 | {"extra_special_tokens": ["<|eot|>"], "additional_special_tokens": ["<|turn|>"]},
    "an empty list": V5 | {"extra_special_tokens": []},
    "named tokens": V5 | {"extra_special_tokens": [], "image_token": "<img>"},
    "named tokens again": {
        **V5,
        **AGAIN,
        "image_token": "<img>",
        "model_specific_special_tokens": {"image_token": "<img>"},
    },
    "a dict": V5 | {"extra_special_tokens": {"image_token": "<img>"}},
    "version 4's class and decoder": {
        **V5,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": ["<|turn|>"],
        "added_tokens_decoder": DECODER,
    },
    "a list in version 4's file": {
        "eos_token": "</s>",
        "extra_special_tokens": ["<|turn|>"],
        "tokenizer_class": "Qwen2Tokenizer",
    },
    "version 5's own defaults of a class": V5 | {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    "a class of neither": {"eos_token": "</s>", "tokenizer_class": "TomorrowsTokenizer"},
    "no class": {"eos_token": "</s>"},
}  # fmt: skip


def assert_is_the_file(tokenizer, directory: Path) -> None:
    """Ids, also those that the tokenizer adds, are those that the tokenizers library makes of tokenizer.json."""
    law = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text).input_ids == law.encode(text).ids
        assert tokenizer(text, add_special_tokens=False).input_ids == law.encode(text, add_special_tokens=False).ids
    assert len(tokenizer) == law.get_vocab_size()


@pytest.mark.parametrize("name", FILES)
def test_files_of_transformers_5_are_read_and_written_for_plain_transformers(name, tmp_path):
    directory = write(tmp_path / "start", FILES[name])
    tokenizer = load_tokenizer(directory)
    assert_is_the_file(tokenizer, directory)
    assert tokenizer.eos_token_id == 257
    # Text becomes no special token, and the template's become the special ones.
    assert not {*range(256, 261)} & {*encode(tokenizer, "".join(SPECIAL))}
    text, start, ids = Template(tokenizer, "chat").render_prompt("a<|eot|>")
    assert (text, start) == ("<|turn|>user: a<|eot|><|eot|>", [])
    assert ids == [258, *encode(tokenizer, "user: a<|eot|>"), 259]

    tokenizer.save_pretrained(tmp_path / "export")
    plain = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert_is_the_file(plain, directory)
    assert_is_the_file(load_tokenizer(tmp_path / "export"), directory)
    assert plain.special_tokens_map == tokenizer.special_tokens_map
    assert plain.chat_template == tokenizer.chat_template
    if "backend" in FILES[name]:
        assert tokenizer.model_input_names == plain.model_input_names == ["input_ids", "attention_mask"]


def test_a_chat_template_names_the_special_tokens_of_a_model(tmp_path):
    for name in ("named tokens", "named tokens again", "a dict"):
        tokenizer = load_tokenizer(write(tmp_path / name, FILES[name], CHAT + "{{ image_token }}"))
        assert Template(tokenizer, "chat").render_prompt("a")[2][-2:] == [259, 260]


def test_a_class_of_transformers_4_does_not_change_what_transformers_5_wrote(tmp_path):
    """LlamaTokenizerFast puts [BOS] in front by default, and wants tokenizer.model for add_prefix_space."""
    spaced = {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"}
    llama().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))
    for config in (V5 | {"tokenizer_class": "LlamaTokenizer"}, V5 | spaced):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert start_tokens(load_tokenizer(tmp_path)) == []
        assert_is_the_file(load_tokenizer(tmp_path), tmp_path)


@pytest.mark.parametrize("config", [V5, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}])
def test_a_space_in_front_of_the_text_is_tokenizer_jsons(config, tmp_path):
    directory = write(tmp_path / "start", config, made=backend(prefix=True, start=True))
    tokenizer = load_tokenizer(directory)
    assert_is_the_file(tokenizer, directory)
    assert tokenizer("a").input_ids == [256, *tokenizer(" a", add_special_tokens=False).input_ids]
    tokenizer.save_pretrained(tmp_path / "export")
    assert_is_the_file(AutoTokenizer.from_pretrained(tmp_path / "export"), directory)


def test_files_of_transformers_4_keep_their_class(tmp_path):
    LlamaTokenizerFast(tokenizer_object=llama().backend_tokenizer).save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)) is LlamaTokenizerFast


def test_only_a_class_that_transformers_lacks_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"no tokenizer class TomorrowsTokenizer: tokenizer\.json is read"):
        load_tokenizer(write(tmp_path / "unknown", FILES["a class of neither"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(write(tmp_path / "known", V5))


def test_a_tokenizer_that_is_code_in_the_directory_is_refused(tmp_path):
    for auto_map in ({"AutoTokenizer": ["own.OwnTokenizer", None]}, ["own.OwnTokenizer", None]):
        write(tmp_path, V5 | {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map})
        with pytest.raises(ValueError, match=r"k: .*its class OwnTokenizer is code in the directory.*save_pretrained"):
            load_tokenizer(tmp_path, key="k")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is no JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "has no tokenizer that can be loaded"),
        ("tokenizer_config.json", '{"backend": "tokenizers", "extra_special_tokens": [3]}', "that can be loaded"),
        ("tokenizer.json", "{", "tokenizer.json is no JSON"),
        ("tokenizer.json", '{"model": {"type": "Tomorrows"}}', "has no tokenizer that can be loaded"),
        ("config.json", "nonsense", "config.json is no JSON"),
    ],
)
def test_broken_files_are_named(file, content, message, tmp_path):
    write(tmp_path, V5)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"k: {tmp_path}.*{message}(.|\n)*save_pretrained"):
        load_tokenizer(tmp_path, key="k")


def test_a_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ByT5Tokenizer, which has no tokenizer.json .convert it to a fast"):
        load_tokenizer(tmp_path)


# Chat templates


NAMED = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "{{ tools }}"}]


def test_of_several_chat_templates_the_default_renders(tmp_path):
    listed = write(tmp_path / "listed", V5 | {"chat_template": NAMED}, template=None)
    filed = write(tmp_path / "filed", V5)
    (filed / "additional_chat_templates").mkdir()
    (filed / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    inside = write(tmp_path / "inside", V5 | {"chat_template": CHAT}, template=None)
    texts = {Template(load_tokenizer(path), "chat").render_prompt("a")[0] for path in (listed, filed, inside)}
    assert texts == {"<|turn|>user: a<|eot|>"}


def test_chat_templates_without_a_default_are_refused(tmp_path):
    directory = write(tmp_path, V5 | {"chat_template": NAMED[1:]}, template=None)
    with pytest.raises(
        ValueError, match=r"data.template=chat: the tokenizer has no chat template named default, only too"
    ):
        Template(load_tokenizer(directory), "chat")


# Tokens without an embedding


def test_a_token_of_text_without_an_embedding_is_refused(tmp_path):
    directory = write(tmp_path, V5)
    load_tokenizer(directory, vocab_size=262)
    for rows, token in ((261, "<think>"), (200, "")):
        with pytest.raises(
            ValueError, match=rf"k: the tokenizer in {tmp_path} gives '{token}.* has {rows} rows .*resize"
        ):
            load_tokenizer(directory, key="k", vocab_size=rows)


def test_an_end_or_start_token_without_an_embedding_is_refused(tmp_path):
    made = backend()
    for token in ("<start>", "<end>", "[PAD]"):
        made.add_special_tokens([token])
    end = write(tmp_path / "end", V5 | {"eos_token": "<end>"}, made=made)
    with pytest.raises(ValueError, match="gives '<end>' the id 263, but"):
        load_tokenizer(end, vocab_size=263)
    with pytest.warns(UserWarning, match="gives '<end>' the id 263, but"):  # what ends outputs is another's to say
        load_tokenizer(end, vocab_size=263, end_token=False)
    made.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 262)])
    start = write(tmp_path / "start", V5, made=made)
    with pytest.raises(ValueError, match="gives '<start>' the id 262, but"):
        load_tokenizer(start, vocab_size=262)


def test_a_special_token_without_an_embedding_is_warned_about_and_no_template_may_write_it(tmp_path):
    made = backend()
    made.add_special_tokens(["[PAD]"])
    directory = write(tmp_path, V5 | {"pad_token": "[PAD]"}, CHAT + "{{ pad_token }}", made)
    with pytest.warns(UserWarning, match=r"k: .*gives '\[PAD\]' the id 262, but the model's embedding has 262 rows"):
        tokenizer = load_tokenizer(directory, key="k", vocab_size=262)
    assert 262 not in encode(tokenizer, "[PAD]")
    assert Template(tokenizer, None).render_prompt("[PAD]")[2] == encode(tokenizer, "[PAD]")
    for template in ("chat", "{prompt}[PAD]"):
        with pytest.raises(ValueError, match=r"the template writes '\[PAD\]', for whose id 262 the model has no"):
            Template(tokenizer, template).render_prompt("a")


def test_a_model_directory_compares_its_tokenizer_with_its_embedding(tmp_path):
    write(tmp_path, V5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 261}))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^the tokenizer in .* gives '<think>' the id 261, but"):
        _ = HuggingFaceDirectory(tmp_path, None).tokenizer


def test_a_model_from_scratch_has_a_row_for_every_id(tmp_path):
    made = json.loads(backend().to_str())
    made["model"]["vocab"]["far"] = 400
    assert (
        start_weights(None, {}, str(write(tmp_path, V5, made=Tokenizer.from_str(json.dumps(made)))), 1).vocab_size
        == 401
    )
    assert start_weights(None, {}, None, 1).vocab_size == len(byte_tokenizer())


# One loader


def loads(tree: ast.AST) -> set[str]:
    """What reads a tokenizer's files in a module."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return (names & {"AutoTokenizer"}) | {
        call for call in calls if call.endswith(("Tokenizer.from_file", "TokenizerFast.from_pretrained"))
    }


def test_tokenizers_are_loaded_in_one_place():
    files = [file for room in ("nemo_brain", "examples") for file in (ROOT / room).rglob("*.py")]
    found = {file.name for file in files if loads(ast.parse(file.read_text(encoding="utf-8")))}
    assert found == {"tokenizer_files.py"}


def test_what_chat_tokenizers_are_written_as_is_read(tmp_path):
    for made in (chatml(), llama()):
        made.save_pretrained(tmp_path)
        read = load_tokenizer(tmp_path)
        assert type(read) is PreTrainedTokenizerFast
        for text in TEXTS:
            assert read(text).input_ids == made(text).input_ids
