"""docs/metrics.md names the metrics that a training of each kind writes: all of them, and no other."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path

import pytest
from completion_server import END, VOCAB, CompletionServer, save_model
from demonstrations import sft_config, write_demonstrations
from models import chat_llama
from ranks import run_ranks
from remote_runs import RELOAD, remote
from reward_runs import TOY, reward_config, write_pairs
from small_runs import SMALL
from toy_runs import ROOT, composed, toy_config

from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.evaluation import evaluate_models
from nemo_brain.training.brain.run import run
from nemo_brain.training.reward_model.run import train_reward_model
from nemo_brain.training.sft.run import fine_tune

PAGE = ROOT / "docs" / "metrics.md"
SECTIONS = {"brain": "BRAIn", "sft": "Supervised fine-tuning", "reward_model": "Reward models"}
PROMPTS = f"{ROOT}/nemo_brain/data/prompts.jsonl"


def told(section: str) -> dict[str, set[str]]:
    """The names in a section's tables, by the kind of record that the line before each of them speaks of."""
    found = defaultdict(set)
    (text,) = re.findall(rf"\n## {section}\n(.*?)(?=\n## |\Z)", PAGE.read_text(), re.DOTALL)
    kind = "step"
    for line in text.splitlines():
        if opening := re.match(r"Of an? (step|iteration|evaluation)", line):
            kind = opening[1].replace("evaluation", "eval")
        elif line.startswith("| `"):
            found[kind] |= set(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    return found


def written(kind: str, directory: Path, *overrides: str) -> dict[str, set[str]]:
    """The names in the records of a short training, or of an evaluation."""
    logging.disable(logging.WARNING)
    options = (f"run_dir={directory / 'run'}", "checkpoint.at_end=false")
    if kind == "brain":
        run(toy_config(*SMALL, *options, *overrides))
    elif kind == "sft":
        toy = [option for option in TOY if not option.startswith("model.head_std")]
        fine_tune(sft_config(*toy, *options, f"data.train={write_demonstrations(directory / 'data.jsonl')}"))
    elif kind == "evaluation":
        model = chat_llama(directory / "model")
        models = (f"run_dir={directory / 'run'}", f"model.restore_from={model}", f"candidates=[{model}]")
        reward = "reward.function=nemo_brain.rewards.toy.letter_fraction"
        evaluate_models(composed("evaluate", *models, f"data.validation={PROMPTS}", reward, "rollout.max_new_tokens=4"))
    else:
        train_reward_model(reward_config(*TOY, *options, f"data.train={write_pairs(directory / 'data.jsonl')}"))
    found = defaultdict(set)
    for record in read_metrics(directory / "run" / "metrics.jsonl"):
        found[record["kind"]] |= record.keys() - {"kind", "step"}
    return found


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_page_names_what_a_training_writes_and_nothing_else(kind, tmp_path):
    (found,) = run_ranks(written, 1, kind, tmp_path)
    if kind == "brain":  # in place of another
        for refresh in ("never", "kl_adaptive"):
            (more,) = run_ranks(written, 1, kind, tmp_path / refresh, f"rollout.refresh={refresh}")
            found["iteration"] |= more["iteration"]
        with CompletionServer(save_model(tmp_path / "served", VOCAB, END)) as server:
            ahead = [*remote(server, tmp_path, reload=RELOAD), "rollout.ahead=1", "rollout.rescore_proposal=false"]
            (more,) = run_ranks(written, 1, kind, tmp_path / "remote", *ahead)
        found["iteration"] |= more["iteration"]
    expected = told(SECTIONS[kind])
    expected["step"] |= told("Every step")["step"]
    assert {kind: sorted(names) for kind, names in found.items()} == {k: sorted(n) for k, n in expected.items()}


def test_the_page_names_what_an_evaluation_writes_and_nothing_else(tmp_path):
    (found,) = run_ranks(written, 1, "evaluation", tmp_path)
    assert found == {"eval": told("BRAIn")["eval"] - {"iteration"} | told("Evaluations")["step"]}
