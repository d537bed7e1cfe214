"""examples/convert.py writes what it reads, refuses what it cannot write, and leaves nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, TOKENS, random_model
from models import SMOLLM2, tensors_of, write_gguf
from toy_runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_brain.convert import export as export_file
from nemo_brain.convert.command import main
from nemo_brain.convert.open import open_weights
from nemo_brain.data.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2 as the script writes it."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    script = [sys.executable, ROOT / "examples" / "convert.py", f"from={SMOLLM2}", f"to={target}"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{target}: LlamaForCausalLM, 272 tensors, 0.538 GB"
    return target


def test_smollm2_from_gguf_to_a_directory_and_on(smollm2, tmp_path):
    source = open_weights(SMOLLM2).source
    found = tensors_of(smollm2)
    assert found.keys() == source.names
    assert all(torch.equal(found[name], source.tensor(name)) for name in found)
    main([f"from={smollm2}", f"to={tmp_path}/bf16", "dtype=bf16", "max_shard_size=100MB"])
    halved = tensors_of(tmp_path / "bf16")
    assert all(torch.equal(halved[name], found[name].bfloat16()) for name in found | halved)
    assert len(list((tmp_path / "bf16").glob("model-*-of-00003.safetensors"))) == 3
    # The GGUF file's tensors give transformers' logits: tests/test_convert.py.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_comes_back_bit_for_bit(tmp_path, name, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    model = random_model(CONFIGS[name])
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    main([f"from={source}", f"to={target}", "dtype=fp32", "max_shard_size=20000"])
    found, expected = tensors_of(target), tensors_of(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in found)
    assert len(list(target.glob("*.safetensors"))) > 3
    assert f"{len(found)} tensors" in capsys.readouterr().out
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
        assert torch.allclose(again(TOKENS[None]).logits, model(TOKENS[None]).logits, atol=1e-5)


def test_published_gpt2_and_pythia_checkpoints_hold_masks_and_lack_prefixes(tmp_path):
    """As openai-community/gpt2 was saved: without transformer. before the names, with the causal masks."""
    for name, mask in (("gpt2", "h.0.attn.bias"), ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias")):
        source = tmp_path / name
        random_model(CONFIGS[name]).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        expected = tensors_of(source)
        stored = {key.removeprefix("transformer."): tensor for key, tensor in expected.items()}
        export_file.save_file({**stored, mask: torch.ones(4)}, source / "model.safetensors", {"format": "pt"})
        main([f"from={source}", f"to={tmp_path}/{name}-target"])
        found = tensors_of(tmp_path / f"{name}-target")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.fixture
def source(tmp_path) -> Path:
    random_model(CONFIGS["gpt2"]).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_nothing_is_overwritten(source, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    with pytest.raises(ValueError, match=r"^to: \S+source exists, and nothing is overwritten"):
        main([f"from={source}", f"to={source}"])
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before
    (tmp_path / "empty").mkdir()
    main([f"from={source}", f"to={tmp_path}/empty"])
    # Nor does a later export of a run take the place of what is here, as it does with exports.
    with pytest.raises(ValueError, match="not an earlier export"):
        export_file.check_target(tmp_path / "empty", "model.export_to")


def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_file, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            main([f"from={source}", f"to={tmp_path}/target"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ValueError, match=r"^from: \S+word_embeddings\.weight has 2\d\d rows, .* vocab_size=300"):
        main([f"from={source}", f"to={tmp_path}/target"])
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], r"^from and to must be given\. Usage: nemo-brain convert from=SOURCE to=DIRECTORY"),
        (["from=a"], r"^to must be given"),
        (["from=a", "to=b", "type=bf16"], r"^'type=bf16' is not one of from=\.\.\., to=\.\.\., dtype=\.\.\., max_"),
        (["from=a", "to=b", "--dtype"], r"^'--dtype' is not one of"),
        (["from=a", "to=b", "to=c"], r"^to is given twice"),
        (["from=a", "to=b", "dtype=fp16"], r"^dtype must be fp32 or bf16, not 'fp16'"),
        (["from=a", "to=b", "max_shard_size=big"], r"^max_shard_size must be a size such as 5GB or 500MB, not 'big'"),
        (["from=a", "to=b", "max_shard_size=0GB"], r"^max_shard_size must be a size"),
        (["from=no/such", "to=b"], r"^from: no/such is neither a directory with config\.json .* huggingface-cli"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        main(arguments)


def test_a_source_without_a_tokenizer_is_refused_before_anything_is_written(source, tmp_path):
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"^from: .*tokenizer\.json"):
        main([f"from={source}", f"to={tmp_path}/target"])
    gguf = write_gguf(tmp_path / "llama.gguf", tokenizer_pre="llama-bpe")
    with pytest.raises(ValueError, match=r"^from: .*tokenizer\.ggml\.pre='llama-bpe' is not supported"):
        main([f"from={gguf}", f"to={tmp_path}/target"])
    assert not (tmp_path / "target").exists()
