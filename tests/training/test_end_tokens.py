"""Runs of a model whose files name several end tokens: they end outputs, and stand in what is exported."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
from ranks import run_ranks
from toy_runs import QUIET, composed
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.training.brain.run import run
from nemo_brain.training.sft.run import fine_tune

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<pad>{% endfor %}[assistant] "
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
END, PAD = 256, 257  # the chat template closes a turn with <pad>
KEPT = {"temperature": 0.6, "do_sample": False, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.fixture
def directory(tmp_path) -> Path:
    """A random Llama; its generation_config.json has what transformers refuses to write again."""
    path = tmp_path / "start"
    config = LlamaConfig(vocab_size=258, max_position_embeddings=128, eos_token_id=END, **SIZES)
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({**KEPT, "eos_token_id": [END, PAD]}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


def trained(kind: str, train, *overrides: str) -> list[str]:
    """Trains on one rank; what was warned of."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(composed(kind, *QUIET, *overrides))
    return [str(warning.message) for warning in said]


BRAIN = [
    "trainer.max_iterations=1",
    "trainer.val_every_iterations=1",
    "model.gpt=null",
    "data.template=chat",
    "data.max_prompt_tokens=40",
    "data.holdout=4",
    "rollout.prompts_per_iteration=8",
    "rollout.max_new_tokens=24",
    "rollout.save=true",
]


def brain(directory: Path, out: Path, *overrides: str) -> tuple[list[dict], list[str]]:
    """The outputs of a run and its warnings."""
    options = [f"model.restore_from={directory}", f"run_dir={out}", f"model.export_to={out}/model", *BRAIN, *overrides]
    (said,) = run_ranks(trained, 1, "toy", run, *options)
    lines = (out / "rollouts.jsonl").read_text().splitlines()
    return [output for line in lines for output in json.loads(line)["outputs"]], said


def test_every_end_token_ends_an_output_and_is_exported(directory, tmp_path):
    outputs, said = brain(directory, tmp_path / "run")
    assert {output["token_ids"][-1] for output in outputs if output["ended"]} == {END, PAD}
    for output in outputs:
        assert not {END, PAD} & set(output["token_ids"][:-1])
        assert "<pad>" not in output["text"] and "<eos>" not in output["text"]
    assert not any("closes the assistant's turn" in message for message in said)
    written = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [END, PAD] and KEPT.items() <= written.items()
    assert GenerationConfig.from_pretrained(tmp_path / "run" / "model").eos_token_id == [END, PAD]
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["eos_token_id"] == [END, PAD]


def test_the_keys_say_what_ends_an_output(directory, tmp_path):
    keys = [f"rollout.stop_token_ids=[{END}]", "rollout.stop_strings=['e']"]
    outputs, said = brain(directory, tmp_path / "run", *keys)
    ended = [output for output in outputs if output["ended"]]
    assert any(output["token_ids"][-1] != END for output in ended), "some end with the string"
    assert any(PAD in output["token_ids"] for output in outputs), "this one is text now"
    assert all("e" not in output["text"].replace("<pad>", "") for output in outputs)
    assert any(f"'<pad>' ({PAD}), which ends no output" in m and "rollout.stop_token_ids" in m for m in said)
    written = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == END


def test_fine_tuning_ends_an_answer_as_the_template_does(directory, tmp_path):
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(4)))
    options = [
        f"run_dir={tmp_path}/run",
        f"data.train={data}",
        "data.template=chat",
        "data.holdout=0",
        "data.max_prompt_tokens=40",
        "data.max_output_tokens=8",
        "train.global_batch_size=4",
        "trainer.epochs=1",
        f"model.export_to={tmp_path}/model",
    ]
    (said,) = run_ranks(trained, 1, "sft", fine_tune, f"model.restore_from={directory}", *options)
    assert not any("closes the assistant's turn" in message for message in said)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [END, PAD]
    (directory / "generation_config.json").unlink()
    (said,) = run_ranks(
        trained, 1, "sft", fine_tune, f"model.restore_from={directory}", *options, f"run_dir={tmp_path}/other"
    )
    assert any(f"'<pad>' ({PAD}), which ends no output" in message for message in said)


@pytest.mark.parametrize(("kind", "train"), [("toy", run), ("sft", fine_tune)])
def test_a_model_without_an_end_token_is_refused_before_training(directory, tmp_path, kind, train):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((directory / name).read_text())
        content["eos_token_id"] = None
        (directory / name).write_text(json.dumps(content))
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    options = [f"model.restore_from={directory}", f"run_dir={tmp_path}/run", f"data.train={data}"]
    options += (
        ["model.gpt=null", "data.max_prompt_tokens=40"]
        if kind == "toy"
        else ["trainer.epochs=1", "data.max_prompt_tokens=9", "data.max_output_tokens=9"]
    )
    with pytest.raises(AssertionError, match="ValueError: no token ends an output"):
        run_ranks(trained, 1, kind, train, *options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
