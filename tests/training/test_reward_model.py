"""A reward model in every layout is the one of a single process, and the one that transformers computes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from layouts import PP2, SP, TP2
from models import tensors_of
from omegaconf import OmegaConf
from ranks import run_ranks
from reward_runs import RUN, TOY, compare, loaded, recorded_training, reward_config, write_pairs
from schemas import file_keys, schema_keys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from nemo_brain.config.reward_model import RewardConfig, check_reward_config
from nemo_brain.convert.reward import open_reward_model
from nemo_brain.core.groups import Group, Output, Prompt
from nemo_brain.core.packing import plan
from nemo_brain.data.examples import split_conversations
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.reward_head import HEAD
from nemo_brain.model.reward_passes import RewardPasses
from nemo_brain.training.reward_model.passes import preference_losses
from nemo_brain.training.reward_model.run import train_reward_model

LAYOUTS = {
    "full recompute": (1, ["model.recompute=full"]),
    "selective recompute": (1, ["model.recompute=selective"]),
    "separate rows": (1, ["train.layout=separate_rows"]),
    "every pair larger than the micro-batch": (1, ["train.micro_batch_tokens=1"]),
    "TP2": (2, [TP2]),
    "TP2, sequence parallel": (2, [TP2, SP]),
    "PP2": (2, [PP2]),
    "PP2, 2 virtual stages": (2, [PP2, "model.virtual_pipeline_model_parallel_size=2"]),
    "DP2": (2, []),
    "DP2, distributed optimizer": (2, ["optim.use_distributed_optimizer=true"]),
    "TP2 x PP2": (4, [TP2, PP2]),
    "TP2 x PP2, sequence parallel, full recompute": (
        4,
        [TP2, PP2, SP, "model.recompute=full"],
    ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def reference(pairs, tmp_path_factory) -> dict:
    run_dir = tmp_path_factory.mktemp("reference")
    (result,) = run_ranks(recorded_training, 1, pairs, run_dir, *RUN)
    return {**result, "model": run_dir / "model"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, pairs, reference, tmp_path):
    """Gradients of four steps, metrics, and the exported model."""
    world_size, overrides = LAYOUTS[layout]
    results = run_ranks(recorded_training, world_size, pairs, tmp_path / "run", *RUN, *overrides)
    compare(reference, results, tmp_path / "run" / "model")


def test_virtual_stages_after_another_configuration_in_the_same_process(pairs, reference, tmp_path):
    """NeMo then tracks what a RewardGPTConfig was made from, and would make the second stage's model from that."""
    PackedGPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    world_size, overrides = LAYOUTS["PP2, 2 virtual stages"]
    results = run_ranks(recorded_training, world_size, pairs, tmp_path / "run", *RUN, *overrides)
    compare(reference, results, tmp_path / "run" / "model")


def test_ranks_without_a_pair_join_in(tmp_path):
    """One pair per step on two data-parallel ranks."""
    few = write_pairs(tmp_path / "few.jsonl", 5)
    options = ("trainer.epochs=1", "train.global_batch_size=1", "data.holdout=1")
    (expected,) = run_ranks(recorded_training, 1, few, tmp_path / "reference", *options)
    results = run_ranks(recorded_training, 2, few, tmp_path / "run", *options)
    compare({**expected, "model": tmp_path / "reference" / "model"}, results, tmp_path / "run" / "model")


def test_half_precision_computes_what_single_precision_does(pairs, reference, tmp_path):
    options = (*RUN, "trainer.precision=bf16-mixed")
    (result,) = run_ranks(recorded_training, 1, pairs, tmp_path / "run", *options)
    # From the same weights; those and the hidden states have 8 bits. Later steps start from other weights.
    ours, theirs = (
        next(record for record in run["metrics"] if record["kind"] == "step") for run in (result, reference)
    )
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "run" / "model").values()} == {torch.bfloat16}


def test_the_comparison_can_fail(pairs, reference, tmp_path):
    results = run_ranks(recorded_training, 1, pairs, tmp_path / "run", *RUN, "train.centering=0.11")
    with pytest.raises(AssertionError):
        compare(reference, results, tmp_path / "run" / "model")


def test_loss_and_gradient_are_those_of_plain_torch(pairs, tmp_path):
    """Bradley-Terry on transformers' LlamaForSequenceClassification with the weights before the first step."""
    options = ("data.holdout=0", "train.subtract_mean=false", "train.global_batch_size=32", "trainer.epochs=1")
    (start,) = run_ranks(recorded_training, 1, pairs, tmp_path / "start", *options, "optim.lr=1e-30")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "start" / "model")
    losses = []
    for pair in loaded(pairs):
        chosen, rejected = (
            model(torch.tensor([pair.group.prompt.token_ids + output.token_ids])).logits[0, 0]
            for output in pair.group.outputs
        )
        losses.append(-F.logsigmoid(chosen - rejected - pair.margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    # fp32 in another order of summation.
    assert start["metrics"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = start["gradients"][0]
    for ours, theirs in (
        (HEAD, model.score.weight),
        ("embedding.word_embeddings.weight", model.model.embed_tokens.weight),
        ("decoder.final_layernorm.weight", model.model.norm.weight),
        ("decoder.layers.1.mlp.linear_fc2.weight", model.model.layers[1].mlp.down_proj.weight),
    ):
        assert (gradients[ours] - theirs.grad).norm() < 1e-4 * theirs.grad.norm(), ours


def test_margin_and_centering_by_hand():
    rewards_P2 = torch.tensor([[2.0, 0.5], [-1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    losses_P = preference_losses(rewards_P2, torch.tensor([1.0, 0.0], dtype=torch.float64), 0.1)
    expected = [math.log1p(math.exp(-0.5)) + 0.1 * 2.5**2, math.log1p(math.exp(2.0)) + 0.0]
    torch.testing.assert_close(losses_P.detach(), torch.tensor(expected, dtype=torch.float64))
    losses_P.sum().backward()
    first, second = 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-2.0))
    gradient = [[-first + 0.2 * 2.5, first + 0.2 * 2.5], [-second, second]]
    torch.testing.assert_close(rewards_P2.grad, torch.tensor(gradient, dtype=torch.float64))


def test_unsplit_groups_stay_whole_beyond_the_budget():
    group = Group(Prompt("a", "", [1] * 10), [Output([1] * 20, "", True), Output([1] * 30, "", True)])
    planned = plan([group, group], 40, "shared_prefix", ranks=4, split=False)
    assert planned.whole and [len(batch) for rank in planned.ranks for batch in rank] == [1, 1, 0, 0]


def test_transformers_computes_the_exported_models_scores(pairs, reference):
    """Batched with padding, as its users call it; end tokens count although many tokenizers pad with them."""
    directory = reference["model"]
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.pad_token_id == config["pad_token_id"] != tokenizer.eos_token_id
    held_out = split_conversations(loaded(pairs), 4, seed=0)[1]
    rows = [pair.group.prompt.token_ids + output.token_ids for pair in held_out for output in pair.group.outputs]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    record = reference["metrics"][-1]
    assert scores.mean().item() == pytest.approx(record["eval/reward"], abs=1e-4)
    assert scores[::2].mean().item() == pytest.approx(record["eval/chosen_reward"], abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(record["eval/reward_std"], abs=1e-4)
    # What the model subtracts, so that its rewards have mean zero on these outputs.
    assert config["reward_mean"] == record["eval/reward"]
    assert open_reward_model(directory, "test").mean == record["eval/reward"]


class ScoreBothWays(pl.Callback):
    """Rewards of groups of many outputs by shared-prefix rows, by separate rows, and output by output."""

    def __init__(self, groups: list[Group]):
        self.groups = groups

    def on_train_start(self, trainer, model) -> None:
        strategy = trainer.strategy
        self.results = [
            RewardPasses(model.config, layout, budget).rewards(strategy.chunks, groups)
            for layout, budget, groups in (
                ("shared_prefix", 4096, self.groups),
                ("separate_rows", 4096, self.groups),
                ("shared_prefix", 24, self.groups),
            )
        ]
        ones = [replace(group, outputs=[output]) for group in self.groups for output in group.outputs]
        self.results.append(RewardPasses(model.config, "separate_rows", 1).rewards(strategy.chunks, ones).view(2, -1))


def scored_both_ways(pairs: Path, run_dir: Path, *overrides: str) -> list[torch.Tensor]:
    outputs = [Output(list(range(60, 60 + n)) + [256] * (n % 2), "", bool(n % 2)) for n in range(1, 8)]
    scorer = ScoreBothWays([Group(Prompt(f"{k}", "", [65 + k] * k), outputs) for k in (1, 9)])
    config = reward_config(f"data.train={pairs}", f"run_dir={run_dir}", *TOY, "model.export_to=null", *overrides)
    train_reward_model(config, callbacks=[scorer])
    return scorer.results


def test_shared_prefix_scores_equal_separate_rows(pairs, tmp_path):
    (first, *others) = run_ranks(scored_both_ways, 1, pairs, tmp_path / "one")[0]
    assert first.shape == (2, 7) and first.std() > 0.1
    for other in (*others, *run_ranks(scored_both_ways, 2, pairs, tmp_path / "two", TP2, SP)[1]):
        torch.testing.assert_close(other, first, rtol=0, atol=1e-5)


def test_a_reward_model_is_trained_further(pairs, reference, tmp_path):
    options = (f"model.restore_from={reference['model']}", "model.gpt=null", "data.holdout=4", "optim.lr=1e-30")
    (result,) = run_ranks(recorded_training, 1, pairs, tmp_path / "run", *options)
    again = {k: v for k, v in result["metrics"][-1].items() if k.startswith("eval/") and k != "eval/reliability"}
    # A learning rate of nothing leaves the exported model as it was.
    assert again == pytest.approx({k: reference["metrics"][-1][k] for k in again}, abs=1e-5)


def frozen_training(pairs: Path, run_dir: Path, *overrides: str) -> list:
    config = reward_config(f"data.train={pairs}", f"run_dir={run_dir}", *TOY, *overrides)
    train_reward_model(config)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, ["model.recompute=full"]), (2, [PP2]), (2, [TP2, SP])],
    ids=["one, full recompute", "PP2", "TP2"],
)
def test_frozen_layers_stay_and_the_others_train(pairs, tmp_path, ranks, layout):
    """With PP2 the first stage has nothing to train at all."""
    models = []
    for number, options in enumerate((["optim.lr=1e-30"], ["trainer.epochs=2"])):
        run_dir = tmp_path / str(number)
        run_ranks(frozen_training, ranks, pairs, run_dir, "model.frozen_layers=2", *options, *layout)
        models.append(tensors_of(run_dir / "model"))
    before, after = models
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {n for n in before if "embed" in n or ".layers.0." in n or ".layers.1." in n}


def test_every_key_of_the_schema_is_in_the_file():
    schema = schema_keys(RewardConfig)
    config = reward_config("data.train=x.jsonl")
    assert file_keys(OmegaConf.to_container(config), schema) == schema
    check_reward_config(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+model.freeze=3"], ["model.freeze", "did you mean"]),
        (["trainer.epochs=0"], ["trainer.epochs", "at least 1"]),
        (["model.frozen_layers=-1"], ["model.frozen_layers"]),
        (["model.frozen_layers=1", "model.peft={dim: 8}"], ["model.frozen_layers", "model.peft"]),
        (["train.centering=nan"], ["train.centering", "a finite number, not nan"]),
        (["data.holdout=0"], ["train.subtract_mean", "data.holdout"]),
        (["model.sequence_parallel=true"], ["model.sequence_parallel"]),
        (["data.max_output_tokens=1"], ["data.max_output_tokens"]),
    ],
)
def test_a_mistake_is_refused_with_its_key(overrides, words):
    with pytest.raises(ValueError) as caught:
        check_reward_config(reward_config("data.train=x.jsonl", *overrides))
    assert all(word in str(caught.value) for word in words)


def test_what_is_no_reward_model_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"reward.restore_from: .* is not the directory of a reward model"):
            open_reward_model(path, "reward.restore_from")
