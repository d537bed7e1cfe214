"""Fine-tuning in every layout is that of a single process, and its loss is the one that transformers computes."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from chat_tokenizers import own_stop
from demonstrations import sft_config, write_demonstrations
from layouts import PP2, SP, TP2
from models import damaged_llama, tensors_of
from omegaconf import OmegaConf
from ranks import run_ranks
from reward_runs import TOY as REWARD_TOY
from schemas import file_keys, schema_keys
from toy_runs import GradientRecorder
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_brain.config.sft import SFTConfig, check_sft_config
from nemo_brain.core.groups import Group
from nemo_brain.data.demonstrations import load_demonstrations
from nemo_brain.data.examples import split_conversations
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.sft.run import fine_tune

# fp32; sums over ranks and micro-batches are taken in different orders.
RELATIVE = 1e-5
TOY = tuple(option for option in REWARD_TOY if not option.startswith("model.head_std"))
RUN = ("trainer.epochs=2", "data.holdout=4")
VIRTUAL = "model.virtual_pipeline_model_parallel_size=2"
TIMINGS = ("step_seconds", "tokens_per_second")
LAYOUTS = {
    "full recompute": (1, ["model.recompute=full"]),
    "every demonstration larger than the micro-batch": (1, ["train.micro_batch_tokens=1"]),
    "TP2": (2, [TP2]),
    "TP2, sequence parallel": (2, [TP2, SP]),
    "PP2": (2, [PP2]),
    "PP2, 2 virtual stages": (2, [PP2, VIRTUAL]),
    "DP2": (2, []),
    "DP2, distributed optimizer": (2, ["optim.use_distributed_optimizer=true"]),
    "TP2 x PP2, sequence parallel, 2 virtual stages, full recompute": (
        4,
        [TP2, PP2, SP, VIRTUAL, "model.recompute=full"],
    ),
}


def recorded(demonstrations: Path, run_dir: Path, *overrides: str, callbacks: tuple[pl.Callback, ...] = ()) -> dict:
    """One rank's view of a training: its gradients per step, and rank 0's metrics."""
    logging.disable(logging.WARNING)
    recorder = GradientRecorder()
    config = sft_config(f"data.train={demonstrations}", f"run_dir={run_dir}", *TOY, *overrides)
    fine_tune(config, callbacks=[recorder, *callbacks])
    return {
        "gradients": recorder.steps,
        "metrics": read_metrics(run_dir / "metrics.jsonl") if dist.get_rank() == 0 else None,
    }


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    return write_demonstrations(tmp_path_factory.mktemp("demonstrations") / "demonstrations.jsonl")


@pytest.fixture(scope="module")
def reference(demonstrations, tmp_path_factory) -> dict:
    run_dir = tmp_path_factory.mktemp("reference")
    (result,) = run_ranks(recorded, 1, demonstrations, run_dir, *RUN)
    return {**result, "model": run_dir / "model"}


def compare(expected: dict, ranks: list[dict], model: Path) -> None:
    for ours, theirs in zip(ranks[0]["metrics"], expected["metrics"], strict=True):
        assert (ours["kind"], ours["epoch"]) == (theirs["kind"], theirs["epoch"])
        for name in theirs.keys() - {*TIMINGS, "kind", "epoch"}:
            assert ours[name] == pytest.approx(theirs[name], rel=RELATIVE), (theirs["step"], name)
    for step, full in enumerate(expected["gradients"]):
        seen = set()
        for rank in ranks:
            seen |= rank["gradients"][step].keys()
            for name, gradient in rank["gradients"][step].items():
                error = (gradient - full[name]).norm() / full[name].norm()
                assert error < RELATIVE, (step, name, float(error))
        assert seen == full.keys()
    for name, tensor in tensors_of(expected["model"]).items():
        torch.testing.assert_close(tensors_of(model)[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, demonstrations, reference, tmp_path):
    """Gradients of four steps, metrics, and the exported model."""
    world_size, overrides = LAYOUTS[layout]
    results = run_ranks(recorded, world_size, demonstrations, tmp_path / "run", *RUN, *overrides)
    compare(reference, results, tmp_path / "run" / "model")


def test_ranks_without_a_demonstration_join_in(tmp_path):
    """One demonstration per step on two data-parallel ranks."""
    few = write_demonstrations(tmp_path / "few.jsonl", 5)
    options = ("train.global_batch_size=1", "data.holdout=1")
    (expected,) = run_ranks(recorded, 1, few, tmp_path / "reference", *options)
    results = run_ranks(recorded, 2, few, tmp_path / "run", *options)
    compare({**expected, "model": tmp_path / "reference" / "model"}, results, tmp_path / "run" / "model")


def test_the_comparison_can_fail(demonstrations, reference, tmp_path):
    results = run_ranks(recorded, 1, demonstrations, tmp_path / "run", *RUN, "data.max_output_tokens=15")
    with pytest.raises(AssertionError):
        compare(reference, results, tmp_path / "run" / "model")


def groups_of(demonstrations: Path) -> tuple[list[Group], list[Group]]:
    """The training and held-out groups of the reference."""
    tokenizer = byte_tokenizer()
    examples = load_demonstrations(
        str(demonstrations),
        tokenizer=tokenizer,
        stop=own_stop(tokenizer),
        template=None,
        max_prompt_tokens=16,
        max_output_tokens=16,
    ).examples
    train, held_out = split_conversations(examples, 4, seed=0)
    return [e.group for e in train], [e.group for e in held_out]


def transformers_loss(model, groups: list[Group]) -> torch.Tensor:
    """Its cross-entropy on a batch of padded rows, prompts and padding ignored."""
    rows, labels = [], []
    for group in groups:
        prompt, completion = group.prompt.token_ids, group.outputs[0].token_ids
        padding = 40 - len(prompt) - len(completion)
        rows.append([*prompt, *completion, *[0] * padding])
        labels.append([*[-100] * len(prompt), *completion, *[-100] * padding])
    return model(torch.tensor(rows), labels=torch.tensor(labels)).loss


def test_loss_and_gradient_are_those_of_transformers(demonstrations, tmp_path):
    """Of the first step, with the weights before it."""
    options = ("train.global_batch_size=32", "data.holdout=4", "optim.lr=1e-30", "trainer.epochs=1")
    (start,) = run_ranks(recorded, 1, demonstrations, tmp_path / "start", *options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start" / "model")
    loss = transformers_loss(model, groups_of(demonstrations)[0])
    loss.backward()
    first = next(record for record in start["metrics"] if record["kind"] == "step")
    # fp32 in another order of summation.
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = start["gradients"][0]
    for ours, theirs in (
        ("embedding.word_embeddings.weight", model.model.embed_tokens.weight),
        ("decoder.final_layernorm.weight", model.model.norm.weight),
        ("decoder.layers.1.mlp.linear_fc2.weight", model.model.layers[1].mlp.down_proj.weight),
    ):
        assert (gradients[ours] - theirs.grad).norm() < 1e-4 * theirs.grad.norm(), ours


def test_training_lowers_the_held_out_loss_which_transformers_computes_from_the_export(demonstrations, tmp_path):
    (result,) = run_ranks(recorded, 1, demonstrations, tmp_path / "run", "trainer.epochs=8", "data.holdout=4")
    evaluations = [record for record in result["metrics"] if record["kind"] == "eval"]
    assert [record["epoch"] for record in evaluations] == [None, *range(8)]
    start, last = evaluations[0], evaluations[-1]
    # Uniform over 258 tokens at first; uniform over the eight letters and the end would be log 9 = 2.2.
    assert start["eval/loss"] == last["eval/start_loss"] == pytest.approx(math.log(258), abs=0.1)
    assert last["eval/loss"] < 4.0
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))
    held_out = groups_of(demonstrations)[1]
    assert last["eval/completions"] == 4
    assert last["eval/completion_tokens"] == sum(len(group.outputs[0].token_ids) for group in held_out)
    directory = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert transformers_loss(model, held_out).item() == pytest.approx(last["eval/loss"], rel=1e-5)
    assert AutoTokenizer.from_pretrained(directory)("Say 1").input_ids == list(b"Say 1")


def test_adapters_are_trained_and_merged_into_the_export(demonstrations, tmp_path):
    options = ("trainer.epochs=8", "data.holdout=4", "model.peft={dim: 4, alpha: 8}", "optim.lr=0.1")
    (result,) = run_ranks(recorded, 1, demonstrations, tmp_path / "run", *options)
    assert {name for name in result["gradients"][0] if "adapter" not in name} == set()
    start, *_, last = (record for record in result["metrics"] if record["kind"] == "eval")
    assert last["eval/loss"] < start["eval/loss"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        loss = transformers_loss(model, groups_of(demonstrations)[1]).item()
    # The merged weights are rounded once.
    assert loss == pytest.approx(last["eval/loss"], rel=1e-4)


def test_cuts_are_counted_and_the_end_is_summed_up(demonstrations, tmp_path, capfd):
    run_ranks(recorded, 2, demonstrations, tmp_path / "run", *RUN, "trainer.epochs=1", "data.max_prompt_tokens=5")
    lines = capfd.readouterr().out.splitlines()
    cut = "data.train: of 32 examples 22 prompts were cut to 5 tokens, 1 outputs to 16"
    assert [line for line in lines if line.startswith("data.train")] == [cut]
    assert [line.split("  ")[0] for line in lines[-5:]] == [
        "held-out loss",
        "perplexity",
        "training",
        "model",
        "report",
    ]


class Spoil(pl.Callback):
    """The second step's gradient becomes infinite."""

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step == 1:
            for buffer in trainer.strategy.chunks[0].buffers:
                buffer.grad_data.fill_(math.inf)


def spoiled(demonstrations: Path, run_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:
        recorded(demonstrations, run_dir, *RUN, callbacks=(Spoil(),))
    return str(caught.value)


def test_a_gradient_that_is_not_finite_stops_the_training(demonstrations, tmp_path):
    for message in run_ranks(spoiled, 2, demonstrations, tmp_path / "run"):
        assert message.startswith("the gradient of step 2 is not finite") and "optim.lr" in message
    assert not (tmp_path / "run" / "model").exists()


def test_logits_that_are_not_finite_end_every_replica(tmp_path):
    """One of them samples for the held-out prompt whose embedding is NaN."""
    model = damaged_llama(tmp_path / "model")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": p, "completion": "a"}) + "\n" for p in ("x", "~")))
    data = write_demonstrations(tmp_path / "data.jsonl")

    def refused() -> str:
        start = [f"model.restore_from={model}", "model.allow_nonfinite=true", f"data.validation={held_out}"]
        toy = [option for option in TOY if not option.startswith("model.")]
        with pytest.raises(ValueError) as caught:
            fine_tune(sft_config(f"data.train={data}", f"run_dir={tmp_path}/run", *toy, *start))
        return str(caught.value)

    one, other = run_ranks(refused, 2)
    assert one == other
    assert re.search(r"logits are not finite .* after 0 tokens of output 0 to the prompt 'held_out:2'", one), one


def test_every_key_of_the_schema_is_in_the_file():
    schema = schema_keys(SFTConfig)
    config = sft_config("data.train=x.jsonl")
    assert file_keys(OmegaConf.to_container(config), schema) == schema
    check_sft_config(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+train.layout=auto"], ["train.layout"]),
        (["trainer.epochs=0"], ["trainer.epochs", "at least 1"]),
        (["data.assistant_turns=first"], ["data.assistant_turns", "all, last"]),
        (["data.max_output_tokens=1"], ["data.max_output_tokens", "at least 2"]),
        (["train.micro_batch_tokens=0"], ["train.micro_batch_tokens"]),
        (["model.sequence_parallel=true"], ["model.sequence_parallel"]),
        (["+data.max_tokens=1"], ["data.max_tokens", "did you mean"]),
    ],
)
def test_a_mistake_is_refused_with_its_key(overrides, words):
    with pytest.raises(ValueError) as caught:
        check_sft_config(sft_config("data.train=x.jsonl", *overrides))
    assert all(word in str(caught.value) for word in words)


def test_a_demonstration_longer_than_the_models_context_is_refused(demonstrations, tmp_path):
    config = sft_config(f"data.train={demonstrations}", *TOY, f"run_dir={tmp_path}", "data.max_output_tokens=60")
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens \+ data\.max_output_tokens is 76, more than .* 64"):
        fine_tune(config)
