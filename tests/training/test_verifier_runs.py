"""Whole runs of the toy with verifiers as rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from ranks import run_ranks
from small_runs import NO_VALIDATION, SMALL, records
from toy_runs import toy_config

from nemo_brain.report.metrics import read_samples
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import compute_rewards
from nemo_brain.training.brain.run import run

ROOM, FUNCTION = "nemo_brain.rewards.verifiers", "nemo_brain.rewards.function.FunctionReward"
PARTS = [
    {"weight": 1.0, "_target_": FUNCTION, "function": "nemo_brain.rewards.toy.letter_fraction"},
    {"weight": 0.5, "_target_": f"{ROOM}.pattern.RegexReward", "pattern": "[a-m]", "match": "search"},
    {"weight": 0.5, "_target_": f"{ROOM}.penalties.LengthPenalty", "max_length": 8, "buffer": 8, "unit": "characters"},
    {"weight": 2.0, "_target_": f"{ROOM}.code.CodeReward", "fenced": False, "isolation": "none"},
]
WEIGHTED = {"_target_": "nemo_brain.rewards.weighted.WeightedReward", "rewards": PARTS}
TESTS = ["assert 1 == 1"]


def write(path: Path, *without_tests: str) -> Path:
    lines = [{"id": f"p{i}", "prompt": f"{i}:", "tests": TESTS} for i in range(8)]
    for line in lines:
        if line["id"] in without_tests:
            del line["tests"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def verified(run_dir: Path, prompts: Path) -> None:
    config = toy_config(
        *SMALL, NO_VALIDATION, "trainer.max_iterations=1", f"run_dir={run_dir}", f"data.train={prompts}"
    )
    OmegaConf.set_struct(config, False)
    config.reward = WEIGHTED
    run(config)


def test_a_weighted_sum_of_verifiers_trains_and_gives_what_it_gives_outside(tmp_path):
    run_ranks(verified, 1, tmp_path / "run", write(tmp_path / "prompts.jsonl"))
    assert len(records(tmp_path / "run", "step")) == 1
    outputs = [output for group in read_samples(tmp_path / "run" / "samples.jsonl") for output in group["outputs"]]
    count, texts = len(outputs), [output["text"] for output in outputs]
    again = compute_rewards(
        make_reward(WEIGHTED), [""] * count, texts, references=[None] * count, metadata=[{"tests": TESTS}] * count
    )
    assert again == [output["reward"] for output in outputs] and len(set(again)) > 2


def test_a_prompt_that_cannot_be_verified_is_named_before_training(tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", "p5")
    with pytest.raises(
        AssertionError, match=r"cannot score outputs to the prompt 'p5': reward\.rewards\[3\]: no tests"
    ):
        run_ranks(verified, 1, tmp_path / "run", prompts)
    assert not (tmp_path / "run").exists()
