"""What a run reads is data: a record, a configuration of Hugging Face or its directory run no code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from small_runs import NO_VALIDATION, records, train
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from nemo_brain.convert.open import open_weights
from nemo_brain.data.prompts import load_prompts
from nemo_brain.data.tokenizers import byte_tokenizer, load_tokenizer
from nemo_brain.rewards.huggingface import HuggingFaceReward
from nemo_brain.rewards.minilm import MiniLM


class Trap:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def trap(tmp_path) -> Path:
    """A file that code would make; it works."""
    file = tmp_path / "executed"
    pickle.loads(pickle.dumps(Trap(file)))
    assert file.exists()
    file.unlink()
    return file


def spoiled(directory: Path, model: type, trap: Path) -> Path:
    """A Hugging Face directory that asks in every way for code of its own to be run."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
        pad_token_id=257,
    )
    model(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "own.py").write_text(f"open({str(trap)!r}, 'w')\nclass Own: pass\n")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        fields = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
        target = {"_target_": "pathlib.Path.touch", "_args_": [str(trap)]}
        kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        fields |= target | {"auto_map": {**dict.fromkeys(kinds, "own.Own"), "AutoTokenizer": ["own.Own", "own.Own"]}}
        fields["reward"] = target
        (directory / name).write_text(json.dumps(fields))
    torch.save(Trap(trap), directory / "pytorch_model.bin")
    return directory


def test_a_hugging_face_directory_runs_no_code(tmp_path, trap):
    """Its own classes (auto_map), targets of Hydra's and pickled weights are passed over."""
    policy = spoiled(tmp_path / "policy", LlamaForCausalLM, trap)
    weights = open_weights(policy)
    assert weights.vocab_size == len(weights.tokenizer) == 258
    name = "embedding.word_embeddings.weight"
    assert weights.tensor(name, (258, 16)).shape == (258, 16)
    assert type(load_tokenizer(policy)).__module__.startswith("transformers.")
    reward = HuggingFaceReward(str(spoiled(tmp_path / "reward", LlamaForSequenceClassification, trap)), template="pair")
    reward.load()
    assert type(reward._model) is LlamaForSequenceClassification
    MiniLM(policy)
    assert not trap.exists()


def test_pickled_weights_alone_are_refused(tmp_path, trap):
    for model, read in ((LlamaForCausalLM, open_weights), (LlamaForSequenceClassification, HuggingFaceReward)):
        directory = spoiled(tmp_path / model.__name__, model, trap)
        (directory / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"only pickled weights|safetensors alone are read"):
            read(str(directory))
    with pytest.raises(OSError, match="safetensors"):
        MiniLM(directory)
    assert not trap.exists()


def test_a_target_in_a_record_is_metadata(tmp_path, trap):
    """It reaches the reward as any other key does, and nothing is made of it."""
    target = {"_target_": "pathlib.Path.touch", "_args_": [str(trap)]}
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"p{i}", **target, "reward": target, "metadata": "${oc.env:HOME}"} for i in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (prompt, *_) = load_prompts(file, tokenizer=byte_tokenizer(), template=None, max_prompt_tokens=9).prompts
    assert prompt.metadata == {**target, "reward": target, "metadata": "${oc.env:HOME}"}
    train(tmp_path / "run", f"data.train={file}", NO_VALIDATION, "trainer.max_iterations=1", "rollout.save=true")
    assert len(records(tmp_path / "run", "step")) == 1 and not trap.exists()
