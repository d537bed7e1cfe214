"""Trainings of a toy reward model inside tests, with every gradient of every step recorded."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from toy_runs import QUIET, ROOT, GradientRecorder

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
