"""Adapters: every layout trains them alike, the weights beside them never change, and exports compute the same.

Where gradients are compared, B does not start at zero as it should: the gradient of A would be zero with it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from architectures import CONFIGS, GROUPS, TOKENS, random_model
from layouts import PP2, SP, TP2, VIRTUAL
from models import tensors_of
from parity import LEARNED, RUN
from parity import compare as compare_runs
from peft import PeftModel
from ranks import run_ranks
from resumed_runs import compare as compare_records
from resumed_runs import failure, train, undisturbed
from reward_runs import RUN as REWARD_RUN
from reward_runs import compare as compare_trainings
from reward_runs import recorded_training, write_pairs
from schemas import message
from torch.distributed.checkpoint import FileSystemReader
from toy_runs import ROOT, recorded_run
from transformers import AutoModelForCausalLM

from nemo_brain.convert.export import export_model, make_export
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.durability import checkpoint
from nemo_brain.model import lora
from nemo_brain.model.parameters import VOCABULARY_TENSORS, global_parameters, is_adapter, unwrap
from nemo_brain.model.random_weights import normal
from nemo_brain.model.reward_head import HEAD

DIM, ALPHA = 4, 8
PEFT = f"model.peft={{dim: {DIM}, alpha: {ALPHA}}}"
ADAPTERS = (PEFT, "prior.placement=adapter_off")
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def drawn(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """In place of ``_WithAdapters.tensor``: B is drawn too."""
    return 0.1 * normal(self.seed, name, shape) if is_adapter(name) else self.weights.tensor(name, shape)


def adapted_run(*overrides: str, callbacks=(), **options) -> dict:
    lora._WithAdapters.tensor = drawn
    return recorded_run(*overrides, callbacks=callbacks, **options)


LAYOUTS = {
    "one process, full recompute": (1, ["model.recompute=full"]),
    "one process, selective recompute, resident prior": (1, ["model.recompute=selective", "prior.placement=resident"]),
    "TP2": (2, [TP2]),
    "TP2, sequence parallel, full recompute, two pass": (
        2,
        [TP2, SP, "model.recompute=full", "train.micro_batch_tokens=32"],
    ),
    "PP2, 2 virtual stages": (2, [PP2, VIRTUAL]),
    "DP2, distributed optimizer, everything overlapped in small buckets": (
        2,
        ["optim.use_distributed_optimizer=true", "ddp.overlap_param_gather=true", "+ddp.bucket_size=400"],
    ),
}


@pytest.fixture(scope="module")
def reference() -> dict:
    (result,) = run_ranks(adapted_run, 1, *RUN, *ADAPTERS)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout, reference):
    """Outputs, metrics and gradients of 4 steps; nothing but adapters has gradients."""
    assert all(is_adapter(name) for name in reference["gradients"][0])
    assert len(reference["gradients"][0]) == 4 * len(TARGETS) * 2
    ranks, overrides = LAYOUTS[layout]
    compare_runs(reference, run_ranks(adapted_run, ranks, *RUN, *ADAPTERS, *overrides))


class _Frozen(pl.Callback):
    """At the end of a run: what has changed, what the optimizer holds, and what the prior says."""

    def on_train_end(self, trainer, module) -> None:
        strategy = trainer.strategy
        chunks, passes = strategy.chunks, strategy.passes
        trained = 0
        for parameter in (p for chunk in chunks for p in global_parameters(unwrap(chunk))):
            full = parameter.full()
            if is_adapter(parameter.name):
                trained += parameter.parameter.numel()
                assert full.any(), f"{parameter.name} has left zero"
                continue
            shape = tuple(full.shape)
            if parameter.name in VOCABULARY_TENSORS:
                shape = (module.config.vocab_size, *shape[1:])
            start = module.weights.tensor(parameter.name, shape)
            assert torch.equal(full[: shape[0]], start.to(full.dtype)), parameter.name
        (optimizer,) = strategy.optimizers
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trained > 0
        policy = passes.logprobs(chunks, GROUPS)
        with strategy.prior() as score:
            (prior,) = score(GROUPS, lambda tokens: None)
        start = passes.logprobs(strategy.build_frozen_chunks(module.config, module.weights), GROUPS)[0]
        assert torch.equal(prior, start)
        assert torch.equal(passes.logprobs(chunks, GROUPS), policy), "the adapters are on again"
        assert (policy[0] - prior).abs().max() > 0.1, "the policy is another"


SHORT = ("trainer.max_iterations=2", "rollout.prompts_per_iteration=8", "data.holdout=0", "optim.lr=1e-2")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["prior.placement=offload"]),
        (2, [TP2, SP]),
        (1, ["trainer.precision=bf16-mixed", "+model.peft.target_modules=[linear_qkv, linear_fc2]"]),
    ],
    ids=["offloaded prior", "TP2, sequence parallel", "bf16, two targets"],
)
def test_the_prior_is_the_start_model_bit_for_bit_and_nothing_but_adapters_changes(ranks, overrides):
    run_ranks(recorded_run, ranks, *SHORT, *ADAPTERS, *overrides, callbacks=[_Frozen()])


class _ExportAtStart(pl.Callback):
    def __init__(self, directory: Path):
        self.directory = directory

    def on_train_start(self, trainer, module) -> None:
        export = make_export(module.config, module.config.vocab_size, byte_tokenizer(), "test")
        export_model(trainer.strategy.chunks, export, self.directory)


def test_loss_and_gradients_are_those_of_the_merged_model(tmp_path):
    """BRAIn on groups sampled elsewhere: with adapters, and on the weights W + s B A, which are exported before the
    first step. Both models are their own priors. dL/dB = s (dL/dW) A^T and dL/dA = s B^T (dL/dW)."""
    draw, groups = random.Random(0), []
    for line in (ROOT / "examples" / "data" / "rollouts.jsonl").read_text().splitlines()[:3]:
        group = json.loads(line)
        # Of another proposal than the policy: the loss depends on log p and log q.
        for output in group["outputs"]:
            output["proposal_logprob"] = -draw.uniform(15, 25)
        groups.append(json.dumps(group) + "\n")
    (tmp_path / "groups.jsonl").write_text("".join(groups))
    options = (
        "data.train=null",
        f"data.rollouts={tmp_path}/groups.jsonl",
        "data.holdout=0",
        "trainer.max_iterations=1",
        "rollout.prompts_per_iteration=3",
        "rollout.max_new_tokens=16",
        "train.global_batch_size=3",
        "train.epochs_per_iteration=1",
        "prior.placement=offload",
    )
    export = _ExportAtStart(tmp_path / "merged")
    (adapted,) = run_ranks(adapted_run, 1, *options, PEFT, callbacks=[export])
    (merged,) = run_ranks(recorded_run, 1, *options, f"model.restore_from={tmp_path}/merged", "model.gpt=null")
    (base,) = run_ranks(recorded_run, 1, *options)
    losses = [run["metrics"][0]["loss"] for run in (adapted, merged, base)]
    # fp32: differences of log-probs of about 20 nats, which decide the weights.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-2 * losses[0], "the comparison can fail"
    (gradients,), (full,) = adapted["gradients"], merged["gradients"]
    for name in full:
        if name.removesuffix(".weight").endswith(TARGETS):
            layer = name.removesuffix("weight") + "adapter."
            names = f"{layer}linear_in.weight", f"{layer}linear_out.weight"
            a, b = (0.1 * normal(0, n, gradients[n].shape) for n in names)
            for n, expected in zip(names, (b.T @ full[name], full[name] @ a.T), strict=True):
                error = (gradients[n] - ALPHA / DIM * expected).norm() / gradients[n].norm()
                assert error < 1e-5, (n, float(error))  # as in test_parity


def test_a_resumed_run_is_the_uninterrupted_one_and_goes_on_in_another_layout(tmp_path):
    """A model without gate, whose linear_fc1 no layout may take for one with: TP2, then TP2 or one process. A
    checkpoint holds adapters and what the optimizer knows of them, nothing else."""
    options = (*ADAPTERS, *LEARNED, "trainer.max_iterations=2")
    expected, _ = undisturbed(*options, TP2, ranks=2)
    run_ranks(train, 2, str(tmp_path / "run"), *options, TP2, stop_after=3)
    (saved,) = checkpoint.complete(tmp_path / "run" / "checkpoints")
    tensors = FileSystemReader(saved / "weights").read_metadata().state_dict_metadata
    layers = [name for name in tensors if "decoder." in name]
    assert len(layers) >= 3 * 2 * len(TARGETS), "weights and two moments"
    assert all(is_adapter(name) for name in layers)
    assert not [name for name in tensors if "embedding" in name or "output_layer" in name]
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    run_ranks(train, 2, str(tmp_path / "run"), *options, TP2)
    compare_records(tmp_path / "run", expected, tolerance=0)
    changed = failure(tmp_path / "one", *options, "model.peft.dim=8")
    assert "model.peft.dim: 4 -> 8" in changed and "checkpoint.allow_changes=[model.peft.dim]" in changed
    run_ranks(train, 1, str(tmp_path / "one"), *options, "prior.placement=resident")
    compare_records(tmp_path / "one", expected, tolerance=1e-5)


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """By transformers and PEFT alone."""
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(TOKENS[None]).logits


def logits_of(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS[None]).logits


@pytest.mark.parametrize(
    ("model", "ranks", "layout", "names"),
    [
        ("llama, linear rope, biases", 2, [TP2], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        ("gpt_neox", 2, [PP2], {"query_key_value", "dense", "dense_h_to_4h"}),
        ("gpt2", 1, [], {"attn.c_attn", "attn.c_proj", "mlp.c_fc"}),
    ],
)
def test_exported_adapters_and_merged_weights_compute_the_policy(tmp_path, model, ranks, layout, names):
    """Of a run from a Hugging Face directory: PEFT's model and transformers' merged one agree."""
    base = tmp_path / "base"
    random_model(CONFIGS[model]).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    targets = "+model.peft.target_modules=[linear_qkv, linear_proj, linear_fc1]"
    exports = [f"model.export_to={tmp_path}/merged", f"model.export_adapter_to={tmp_path}/adapter"]
    options = (f"model.restore_from={base}", "model.gpt=null", targets, "trainer.max_iterations=1", *exports)
    run_ranks(recorded_run, ranks, *SHORT, *ADAPTERS, *options, *layout)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    short = {name.rpartition(".")[2] for name in names}
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == short
    assert config["r"] == DIM and config["lora_alpha"] == ALPHA and config["base_model_name_or_path"] == str(base)
    merged = logits_of(tmp_path / "merged")
    # fp32: the sum of two products, and one product with the sum.
    torch.testing.assert_close(peft_logits(base, tmp_path / "adapter"), merged, atol=1e-4, rtol=0)
    assert (logits_of(base) - merged).abs().max() > 1e-2, "the adapters were trained"
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.rpartition(".")[0].endswith(tuple(short)) for name in changed)


def adapted_training(*arguments) -> dict:
    lora._WithAdapters.tensor = drawn
    return recorded_training(*arguments)


def test_a_reward_model_trains_its_head_and_adapters(tmp_path):
    """In one process and at TP2 with sequence parallelism alike; the exported model is merged."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    (expected,) = run_ranks(adapted_training, 1, pairs, tmp_path / "one", *REWARD_RUN, PEFT)
    assert HEAD in expected["gradients"][0]
    assert all(is_adapter(name) for name in expected["gradients"][0].keys() - {HEAD})
    results = run_ranks(adapted_training, 2, pairs, tmp_path / "two", *REWARD_RUN, PEFT, TP2, SP)
    compare_trainings({**expected, "model": tmp_path / "one" / "model"}, results, tmp_path / "two" / "model")
    # Trained further without a step to speak of: what was exported scores as what was trained.
    options = (f"model.restore_from={tmp_path}/one/model", "model.gpt=null", "data.holdout=4", "optim.lr=1e-30")
    (again,) = run_ranks(recorded_training, 1, pairs, tmp_path / "again", *options)
    scores = [{k: v for k, v in run["metrics"][-1].items() if k.startswith("eval/")} for run in (expected, again)]
    for score in scores:
        del score["eval/reliability"]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


REFUSED = {
    "another method": (["model.peft={name: dora}"], "model.peft.name", "one of lora, not 'dora'"),
    "unknown key": (["model.peft={rank: 8}"], "model.peft.rank", "unknown"),
    "rank": (["model.peft={dim: 0}"], "model.peft.dim", "at least 1, not 0"),
    "alpha": (["model.peft={alpha: 0}"], "model.peft.alpha", "at least 1, not 0"),
    "rank over ranks": (
        ["model.peft={dim: 3}", TP2],
        "model.peft.dim (3)",
        "a multiple of model.tensor_model_parallel",
    ),
    "dropout": (["model.peft={dropout: 0.1}"], "model.peft.dropout", "must be 0"),
    "unknown target": (
        ["model.peft={target_modules: [q_proj]}"],
        "model.peft.target_modules",
        "linear_qkv, linear_proj",
    ),
    "no target": (["model.peft={target_modules: []}"], "model.peft.target_modules", "is empty"),
    "a target twice": (
        ["model.peft={target_modules: [linear_qkv, linear_qkv]}"],
        "model.peft.target_modules",
        "twice",
    ),
    "no adapter to switch off": (["prior.placement=adapter_off"], "prior.placement=adapter_off", "set model.peft"),
    "no adapter to export": (["model.export_adapter_to=x"], "model.export_adapter_to", "needs model.peft"),
    "one directory": ([PEFT, "model.export_to=x", "model.export_adapter_to=x"], "model.export_adapter_to", "name two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_with_its_key(case):
    overrides, key, remedy = REFUSED[case]
    said = message(*overrides)
    assert key in said and remedy in said
