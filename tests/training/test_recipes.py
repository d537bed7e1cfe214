"""conf/recipes: each is a valid configuration that fits its cards, and with a small model and small data it runs from
fine-tuning to the trained policy."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
from models import chat_llama
from ranks import run_ranks
from toy_runs import QUIET, ROOT, composed
from transformers import AutoModelForCausalLM

from nemo_brain.cli.cost import CARDS, Model, Plan, Rates, Work, memory, peak
from nemo_brain.config.brain import check
from nemo_brain.config.reward_model import check_reward_config
from nemo_brain.config.sft import check_sft_config
from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.run import run
from nemo_brain.training.reward_model.run import train_reward_model
from nemo_brain.training.sft.run import fine_tune

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipes").glob("*.yaml"))
CHECKS = {"sft": check_sft_config, "reward_model": check_reward_config, "brain": check}
SHAPES = {
    "tldr": Model(32, 2560, 10240, 32, 32, 80, 50304, gated=False),  # EleutherAI/pythia-2.8b's config.json
    "hh": Model(32, 4096, 14336, 32, 8, 128, 128256),  # meta-llama/Llama-3.1-8B's
}


def topic_and_kind(name: str) -> tuple[str, str]:
    topic, _, kind = name.partition("_")
    return topic, kind


def test_there_is_one_for_each_step_of_both_tasks():
    assert set(RECIPES) == {f"{topic}_{kind}" for topic in SHAPES for kind in CHECKS}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_its_first_lines_say_how_to_start_it(name):
    topic, kind = topic_and_kind(name)
    config = CHECKS[kind](composed(f"recipes/{name}"))
    assert config.run_dir == f"runs/{topic}/{kind}" and config.trainer.bf16
    command = {"sft": "sft", "reward_model": "reward-model", "brain": "train"}[kind]
    text = (ROOT / "conf" / "recipes" / f"{name}.yaml").read_text()
    assert f"#     torchrun --nproc-per-node 8 -m nemo_brain {command} --config-name recipes/{name}\n" in text


@pytest.mark.parametrize("topic", SHAPES)
def test_brain_fits_8_cards_of_80_gb_with_its_reward_model_beside_it(topic):
    config = check(composed(f"recipes/{topic}_brain"))
    tensor = config.model.tensor_model_parallel_size
    rollout = config.rollout
    work = Work(
        rollout.prompts_per_iteration,
        config.train.global_batch_size,
        config.data.max_prompt_tokens,
        rollout.max_new_tokens,
        rollout.outputs_per_prompt,
        rollout.rows_in_flight,
    )
    # As many groups as the budget takes, or one that is larger.
    tokens = max(config.train.micro_batch_tokens, work.positions())
    held = memory(SHAPES[topic], work, Plan(tensor, 1, 8 // tensor, prior=config.prior.placement), Rates())
    held["activations"] *= tokens / work.positions()
    held["reward model"] = 2 * SHAPES[topic].parameters / tensor
    assert peak(held) < Rates().usable * CARDS["h100"].memory


def files(topic: str, place: Path) -> dict[str, list[str]]:
    """Small data in the public formats, and the overrides that name it, by kind of training."""
    if topic == "tldr":
        posts = [f"SUBREDDIT: r/a\nPOST: {word} happened\n\nTL;DR:" for word in ("one", "two", "six", "ten")]
        rows = [{"prompt": post, "completion": f" {post[21:24]}"} for post in posts]
        pairs = [{"prompt": post, "chosen": f" {post[21:24]}", "rejected": " no"} for post in posts]
        for name, records in {"train": rows, "preferences": pairs}.items():
            (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        train = [f"data.train={place}/train.jsonl", f"data.validation={place}/train.jsonl"]
        return {
            "sft": train,
            "brain": train,
            "reward_model": [f"data.train={place}/preferences.jsonl", "data.holdout=1"],
        }
    turns = [f"\n\nHuman: {word}?\n\nAssistant:" for word in ("one", "two", "six", "ten")]
    text = "".join(json.dumps({"chosen": f"{turn} yes", "rejected": f"{turn} no"}) + "\n" for turn in turns)
    with gzip.open(place / "hh.jsonl.gz", "wt") as file:
        file.write(text)
    named = [f"data.{part}={place}/hh.jsonl.gz" for part in ("train", "validation")]
    made = [f"data.{part}.source={place}/hh.jsonl.gz" for part in ("train", "validation")]
    return {"sft": made, "brain": made, "reward_model": named}


SMALL = (
    "trainer.precision='32'",
    "model.tensor_model_parallel_size=1",
    "model.sequence_parallel=false",
    "train.global_batch_size=2",
    "data.max_prompt_tokens=48",
    *QUIET,
)
EPOCHS = ("data.max_output_tokens=8", "optim.sched=null")
ITERATIONS = (
    "trainer.max_iterations=2",
    "trainer.val_every_iterations=1",
    "rollout.prompts_per_iteration=2",
    "rollout.outputs_per_prompt=2",
    "rollout.max_new_tokens=8",
)


def train(kind: str, topic: str, place: Path, *overrides: str) -> None:
    logging.disable(logging.WARNING)
    steps = ITERATIONS if kind == "brain" else EPOCHS
    where = f"run_dir={place}/{kind}"
    config = composed(f"recipes/{topic}_{kind}", where, *SMALL, *steps, *files(topic, place)[kind], *overrides)
    {"sft": fine_tune, "reward_model": train_reward_model, "brain": run}[kind](config)


@pytest.mark.parametrize("topic", SHAPES)
def test_a_task_runs_to_its_end_with_a_small_model(topic, tmp_path):
    start = chat_llama(tmp_path / "start")
    run_ranks(train, 1, "sft", topic, tmp_path, f"model.restore_from={start}")
    model = f"model.restore_from={tmp_path}/sft/model"
    run_ranks(train, 1, "reward_model", topic, tmp_path, model)
    run_ranks(train, 1, "brain", topic, tmp_path, model, f"reward.restore_from={tmp_path}/reward_model/model")
    records = read_metrics(tmp_path / "brain" / "metrics.jsonl")
    assert [r["iteration"] for r in records if r["kind"] == "eval"] == [0, 1, 2]
    # hh's chosen answers are its references; tldr's completions go under another name.
    assert all(("eval/reference_reward" in r) == (topic == "hh") for r in records if r["kind"] == "eval")
    AutoModelForCausalLM.from_pretrained(tmp_path / "brain" / "model")
