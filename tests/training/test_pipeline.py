"""The whole pipeline as a user runs it, with a model of two layers."""

from __future__ import annotations

import os
import subprocess

import pytest
from toy_runs import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.report.metrics import read_metrics

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.mark.slow
def test_pipeline_from_a_start_model_to_text_by_transformers(tmp_path, warm_python):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    start = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=1024, **sizes))
    start.save_pretrained(tmp_path / "start")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "start")
    out = tmp_path / "out"
    settings = {"OUT": str(out), "MODEL": str(tmp_path / "start"), "PROMPTS": "16", "PROCESSES": "1"}
    settings["PYTHON"] = str(warm_python)
    script = [ROOT / "examples" / "pipeline.sh", "logger.tensorboard=false"]
    done = subprocess.run(script, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nmodel:    ") == done.stdout.count("\nreference:") == 2
    kinds = {
        name: [r["kind"] for r in read_metrics(out / name / "metrics.jsonl")]
        for name in ("sft", "reward_model", "brain")
    }
    assert kinds["sft"] == ["eval", "step", "eval"]
    assert kinds["reward_model"] == ["eval", "step", "eval"]
    assert kinds["brain"] == ["eval", "step", "step", "step", "step", "iteration", "eval"]
