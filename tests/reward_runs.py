"""Trainings of a toy reward model inside tests, with every gradient of every step recorded."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from chat_tokenizers import own_stop
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from models import tensors_of
from omegaconf import DictConfig
from toy_runs import QUIET, ROOT, GradientRecorder

from nemo_brain.data.preferences import load_preferences
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.model.reward_head import HEAD
from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.reward_model.run import train_reward_model

# As in conf/toy.yaml.
TOY = (
    "model.restore_from=null",
    "model.gpt={num_layers: 4, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 64, "
    "seq_length: 64, normalization: RMSNorm, gated_linear_unit: true, add_bias_linear: false, "
    "position_embedding_type: rope, share_embeddings_and_output_weights: true}",
    "model.head_std=0.5",
    "data.template=null",
    "data.max_prompt_tokens=16",
    "data.max_output_tokens=16",
    "train.micro_batch_tokens=128",
    "optim.lr=3e-3",
    "+optim.adam_eps=1e-3",
)


def write_pairs(path: Path, count: int = 32) -> Path:
    """Pairs that letters win over digits, of many lengths, some with a margin, one cut to 16 tokens."""
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            chosen, rejected = ("".join(draw.choices(a, k=draw.randint(1, 12))) for a in ("abcdefgh", "12345"))
            record = {"prompt": f"Say {index}", "chosen": chosen, "rejected": rejected + "6" * 20 * (index == 3)}
            file.write(json.dumps(record | ({"margin": 0.5} if index % 3 else {})) + "\n")
    return path


def reward_config(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("reward_model", overrides=[*QUIET, *overrides])


def recorded_training(pairs: Path, run_dir: Path, *overrides: str) -> dict:
    """One rank's view of a training: its gradients per step, and rank 0's metrics."""
    logging.disable(logging.WARNING)
    recorder = GradientRecorder()
    config = reward_config(f"data.train={pairs}", f"run_dir={run_dir}", *TOY, *overrides)
    train_reward_model(config, callbacks=[recorder])
    return {
        "gradients": recorder.steps,
        "metrics": read_metrics(run_dir / "metrics.jsonl") if dist.get_rank() == 0 else None,
    }


# fp32; sums over ranks and micro-batches are taken in different orders.
RELATIVE = 1e-5
TIMINGS = ("step_seconds", "tokens_per_second", "tokens")
RUN = ("trainer.epochs=2", "train.centering=0.1", "data.holdout=4")


def compare(expected: dict, ranks: list[dict], model: Path) -> None:
    for ours, theirs in zip(ranks[0]["metrics"], expected["metrics"], strict=True):
        assert (ours["kind"], ours["epoch"]) == (theirs["kind"], theirs["epoch"])
        for name in theirs.keys() - {*TIMINGS, "kind", "epoch", "eval/reliability"}:
            assert ours[name] == pytest.approx(theirs[name], rel=RELATIVE, abs=1e-6), (theirs["step"], name)
    for step, full in enumerate(expected["gradients"]):
        seen = {}
        for rank in ranks:
            seen |= rank["gradients"][step]
            for name, gradient in rank["gradients"][step].items():
                error = (gradient - full[name]).norm() / full[name].norm()
                assert error < RELATIVE, (step, name, float(error))
        assert seen.keys() == full.keys() and HEAD in seen
    for name, tensor in tensors_of(expected["model"]).items():
        torch.testing.assert_close(tensors_of(model)[name], tensor, rtol=0, atol=1e-5)


def loaded(pairs: Path) -> list:
    tokenizer = byte_tokenizer()
    return load_preferences(
        str(pairs),
        tokenizer=tokenizer,
        stop=own_stop(tokenizer),
        template=None,
        max_prompt_tokens=16,
        max_output_tokens=16,
    ).examples
