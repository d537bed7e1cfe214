"""The configuration: the shipped files are valid and complete; a mistake is refused with its key and a remedy."""

from __future__ import annotations

import math
import warnings

import pytest
from chat_tokenizers import own_stop
from omegaconf import OmegaConf
from schemas import file_keys, message, schema_keys
from toy_runs import ROOT, composed, toy_config

from nemo_brain.config.brain import check
from nemo_brain.config.serve_reward import ServeConfig, check_serve
from nemo_brain.core.packing import LAYOUTS
from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE
from nemo_brain.objectives import make_objective
from nemo_brain.training.brain.data import read_data
from nemo_brain.training.build import check_schedule, make_ddp, make_optimizer, world_size
from nemo_brain.training.model import make_gpt_config, make_weights

# Configurations of another kind: ServeConfig, and those of test_calibrate.py, test_evaluation.py, test_reward_model.py
# and test_sft.py.
OTHERS = {"calibrate", "evaluate", "serve_reward", "reward_model", "sft"}
CONFIGS = sorted({path.stem for path in (ROOT / "conf").glob("*.yaml")} - OTHERS)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def objective(config):
    return make_objective(**config.objective)


def describe(config):
    return make_gpt_config(config.model, config.trainer, make_weights(config.model, config.seed), config.lengths)


def ranks(config):
    return world_size(config.trainer, config.model)


def optimizer(config):
    return make_optimizer(config.optim, config.trainer)


def reduction(config):
    return make_ddp(config.ddp, config.optim)


def read(config):
    weights = make_weights(config.model, config.seed)
    make_gpt_config(config.model, config.trainer, weights, config.lengths)
    tokenizer, most = weights.tokenizer, config.rollout.max_new_tokens
    return read_data(config.data, config.seed, tokenizer, own_stop(tokenizer), weights.vocab_size, most, None)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_composes_and_is_valid(name):
    config = check(toy_config(name=name))
    assert config.steps_per_iteration >= 1
    assert config.layout in LAYOUTS
    assert ranks(config) == 1
    make_objective(**config.objective)
    optimizer(config)


def test_brain_yaml_states_every_key_of_the_schema_and_no_other():
    schema = schema_keys()
    given = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "brain.yaml"))
    assert file_keys(given, schema) == schema


def test_serve_reward_yaml_is_valid_and_states_every_key_of_its_schema_with_its_default():
    given = composed("serve_reward", "reward.model=/model")
    assert given.keys() == schema_keys(ServeConfig)
    defaults = {**vars(ServeConfig()), "reward": dict(given.reward)}
    assert vars(check_serve(given)) == defaults


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"brain"}))
def test_other_configs_build_on_brain_yaml(name):
    """So their users may rely on the comments there, and every key can be overridden without a plus sign."""
    assert OmegaConf.load(ROOT / "conf" / f"{name}.yaml").defaults[0] == "brain"


REFUSED = {
    "unknown objective": (["objective.name=ppo"], "objective.name 'ppo'", "known: brain, dpg"),
    "objective's missing option": (["objective.name=dpo_sft"], "objective.beta is required", "options of objective"),
    "another objective's option": (["objective.beta=1"], "objective.beta", "gamma, goodness"),
    "an option that no objective has": (["+objective.gama=1"], "objective.gama", "gamma, goodness"),
    "an option set for another objective": (
        ["objective.name=dpo_sft", "objective.beta=1", "objective.gamma=0.1"],
        "unknown option objective.gamma",
        "set to null",
    ),
    "two objectives": (["objective._target_=plug_ins.GDCPlusPlus"], "objective.name=brain and", "set one to null"),
    "no objective": (["objective.name=null"], "set objective.name", "or objective._target_"),
    "objective from nowhere": (["objective.name=null", "objective._target_=no.such"], "objective._target_", "no.such"),
    "unknown section": (["+rollot.save=true"], "rollot", "did you mean rollout"),
    "unknown key": (["+rollout.output_per_prompt=4"], "rollout.output_per_prompt", "did you mean rollout.outputs_per"),
    "unknown, like nothing": (["+zzzzzz=1"], "zzzzzz", "conf/brain.yaml"),
    "wrong type": (["seed=abc"], "seed", "abc"),
    "no value": (["run_dir=???"], "run_dir", "set it in the YAML or on the command line"),
    "precision": (["trainer.precision=16"], "trainer.precision", "32, bf16-mixed"),
    "accelerator": (["trainer.accelerator=tpu"], "trainer.accelerator", "auto, cpu, gpu"),
    "fp8": (["trainer.fp8=int8"], "trainer.fp8", "hybrid, e4m3"),
    "fp8 recipe": (["trainer.fp8_recipe=x"], "trainer.fp8_recipe", "delayed, tensorwise"),
    "fp8 with fp32": (["trainer.fp8=hybrid"], "trainer.fp8", "trainer.precision=bf16-mixed"),
    "recompute": (["model.recompute=all"], "model.recompute", "none, selective, full"),
    "placement": (["prior.placement=disk"], "prior.placement", "resident, offload, adapter_off"),
    "truncated": (["rollout.truncated=drop"], "rollout.truncated", "keep, mask"),
    "layout": (["train.layout=rows"], "train.layout", "auto, "),
    "n of 1": (["rollout.outputs_per_prompt=1"], "rollout.outputs_per_prompt", "at least 2, not 1"),
    "no steps": (["trainer.max_iterations=0"], "trainer.max_iterations", "at least 1, not 0"),
    "no devices": (["trainer.devices=0"], "trainer.devices", "at least 1 or null, not 0"),
    "no batch": (["train.global_batch_size=0"], "train.global_batch_size", "at least 1, not 0"),
    "no validation prompts": (["validation.max_prompts=0"], "validation.max_prompts", "at least 1 or null, not 0"),
    "context parallel": (["model.context_parallel_size=2"], "model.context_parallel_size", "tensor and sequence"),
    "sequence parallel alone": (
        ["model.sequence_parallel=true"],
        "model.sequence_parallel",
        "model.tensor_model_paral",
    ),
    "virtual stages alone": (
        ["model.virtual_pipeline_model_parallel_size=2"],
        "model.virtual_pipeline_model_parallel_size",
        "needs model.pipeline_model_parallel_size above 1",
    ),
    "one virtual stage": (
        ["model.virtual_pipeline_model_parallel_size=1", "model.pipeline_model_parallel_size=2"],
        "model.virtual_pipeline_model_parallel_size",
        "at least 2 or null, not 1",
    ),
    "temperature": (["rollout.temperature=0"], "rollout.temperature", "above 0"),
    "temperature NaN": (["rollout.temperature=nan"], "rollout.temperature", "a finite number, not nan"),
    "negative top-k": (["rollout.top_k=-1"], "rollout.top_k", "at least 0"),
    "top-p above 1": (["rollout.top_p=1.5"], "rollout.top_p", "above 0 and at most 1, not 1.5"),
    "top-k": (["rollout.top_k=5"], "rollout.top_k", "rollout.truncated_sampling_ok=true"),
    "top-p": (["rollout.top_p=0.9"], "rollout.top_p", "rollout.truncated_sampling_ok=true"),
    "top-k rescored": (
        ["rollout.top_k=5", "rollout.truncated_sampling_ok=true"],
        "rollout.rescore_proposal",
        "rollout.rescore_proposal=false",
    ),
    "part of a batch": (["train.global_batch_size=5"], "train.global_batch_size (5", "must be a multiple of"),
    "no data": (["data.train=null"], "data.train", "data.rollouts"),
    "both kinds of data": (["data.rollouts=groups.jsonl"], "data.rollouts", "set either"),
    "holdout below 0": (["data.holdout=-1"], "data.holdout", "at least 0, not -1"),
    "holdout of no whole number": (["data.holdout=2.5"], "data.holdout", "a fraction below 1 or a number of prompts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_names_the_key_and_the_remedy(case):
    overrides, key, remedy = REFUSED[case]
    text = message(*overrides)
    assert key in text and remedy in text, text


def test_top_k_is_accepted_once_its_cost_is():
    accepted = ["rollout.top_k=5", "rollout.truncated_sampling_ok=true", "rollout.rescore_proposal=false"]
    assert check(toy_config(*accepted)).rollout.top_k == 5


TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
VIRTUAL = "model.virtual_pipeline_model_parallel_size"

LATER = {
    "devices without torchrun": (ranks, ["trainer.devices=2"], "trainer.devices (2)", "torchrun"),
    "nodes without torchrun": (ranks, ["trainer.num_nodes=2"], "trainer.num_nodes (2)", "torchrun"),
    "more shards than processes": (ranks, [f"{TP}=2"], TP, "torchrun --nproc-per-node"),
    "more stages than processes": (ranks, [f"{PP}=2"], PP, "torchrun --nproc-per-node"),
    "gamma of 0": (objective, ["objective.gamma=0"], "objective.gamma", "must be a positive number"),
    "goodness": (objective, ["objective.goodness=x"], "objective.goodness", "bradley_terry, sigmoid"),
    "batched messages of virtual stages": (
        describe,
        [f"{PP}=2", f"{VIRTUAL}=2", "+model.options.batch_p2p_comm=true"],
        "batch_p2p_comm=True",
        f"{VIRTUAL}=null",
    ),
    "unknown model field": (describe, ["+model.gpt.num_layer=4"], "model.gpt.num_layer", "did you mean num_layers"),
    "hidden dropout": (describe, ["+model.gpt.hidden_dropout=0.1"], "model.gpt.hidden_dropout", "must be 0"),
    "attention dropout": (describe, ["+model.gpt.attention_dropout=0.1"], "model.gpt.attention_dropout", "must be 0"),
    "experts": (describe, ["+model.gpt.num_moe_experts=4"], "model.gpt.num_moe_experts", "not supported"),
    "precision of the model": (describe, ["+model.gpt.bf16=true"], "model.gpt.bf16", "set trainer.precision"),
    "attention window": (describe, ["+model.gpt.window_size=[4,0]"], "model.gpt.window_size", "leave it out"),
    "attention as an option": (describe, ["+model.options.softmax_type=learnable"], "options.softmax_type", "vanilla"),
    "parallel size of the model": (describe, ["+model.gpt.tensor_model_parallel_size=2"], f"set {TP}", "model.gpt."),
    "another vocabulary": (describe, ["+model.gpt.vocab_size=100"], "model.gpt.vocab_size", "leave it out"),
    "no model": (describe, ["model.gpt=null"], "model.gpt.num_layers", "model.restore_from"),
    "model twice": (describe, ["model.restore_from=/x"], "model.gpt", "set model.gpt=null with model.restore_from"),
    "heads over shards": (describe, [f"{TP}=3"], f"{TP} (3)", "must divide the 4 attention heads"),
    "key-value heads over shards": (describe, [f"{TP}=4"], f"{TP} (4)", "the 2 key-value heads"),
    "layers over stages": (describe, [f"{PP}=3"], "4 layers", PP),
    "layers over virtual stages": (describe, [f"{PP}=2", f"{VIRTUAL}=3"], "over 6 stages", VIRTUAL),
    "width of heads": (describe, ["model.gpt.hidden_size=34"], "model.gpt.hidden_size (34)", "multiple of the 4 heads"),
    "positions": (describe, ["rollout.max_new_tokens=33"], "model.gpt.seq_length", "lower them"),
    "unknown model option": (describe, ["+model.options.num_layer=4"], "model.options.num_layer", "num_layers"),
    "another model": (describe, ["+model.options.num_layers=5"], "model.options.num_layers=5", "num_layers=4"),
    "key of its own as an option": (describe, ["+model.options.recompute=full"], "set model.recompute", "has a key"),
    "unknown reduction": (
        reduction,
        ["+ddp.overlap_grad_reduction=true"],
        "ddp.overlap_grad_reduction",
        "overlap_grad_red",
    ),
    "distributed optimizer as reduction": (
        reduction,
        ["+ddp.use_distributed_optimizer=true"],
        "ddp.use_distributed_optimizer",
        "set optim.use_distributed_optimizer",
    ),
    "gather without shards": (
        reduction,
        ["ddp.overlap_param_gather=true"],
        "ddp.overlap_param_gather",
        "optim.use_distributed_optimizer=true",
    ),
    "gather without overlapped reduction": (
        reduction,
        ["ddp.overlap_param_gather=true", "optim.use_distributed_optimizer=true", "ddp.overlap_grad_reduce=false"],
        "ddp.overlap_param_gather",
        "ddp.overlap_grad_reduce=true",
    ),
    "unknown optimizer field": (optimizer, ["+optim.learning_rate=1"], "optim.learning_rate", "no such field"),
    "like an optimizer field": (
        optimizer,
        ["+optim.weight_decy=1"],
        "optim.weight_decy",
        "did you mean weight_decay",
    ),
    "optimizer": (optimizer, ["optim.name=lion"], "optim.name", "adam or sgd"),
    "no learning rate": (optimizer, ["optim.lr=0"], "optim.lr", "above 0"),
    "scheduler": (optimizer, ["optim.sched={name: Cosine}"], "optim.sched.name", "CosineAnnealing"),
    "scheduler's arguments": (optimizer, ["optim.sched={name: CosineAnnealing, x: 1}"], "optim.sched", "'x'"),
    "missing file": (read, ["data.train=/none.jsonl"], "data.train", "/none.jsonl"),
    "missing validation file": (read, ["data.validation=/none.jsonl"], "data.validation", "/none.jsonl"),
    "missing rollouts": (read, ["data.train=null", "data.rollouts=/none.jsonl"], "data.rollouts", "/none.jsonl"),
    "all held out": (read, ["data.holdout=64"], "data.holdout", "lower it"),
    "data from nowhere": (read, ["data.train={_target_: no.such}"], "data.train", "no.such"),
}


@pytest.mark.parametrize("case", LATER)
def test_what_is_checked_next_names_the_key_and_the_remedy(case):
    then, overrides, key, remedy = LATER[case]
    check(toy_config(*overrides))  # it is not the schema that refuses it
    text = message(*overrides, then=then)
    assert key in text and remedy in text, text


def test_world_size_must_be_what_torchrun_started(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks(check(toy_config("trainer.num_nodes=2", f"{TP}=2"))) == 4
    assert "--nnodes" in message(then=ranks)
    assert "trainer.devices (4)" in message("trainer.devices=4", "trainer.num_nodes=2", then=ranks)
    assert "(4)" in message("trainer.num_nodes=2", f"{TP}=3", then=ranks)


def test_a_scheduler_and_optimizer_fields_arrive():
    sched = "optim.sched={name: CosineAnnealing, warmup_steps: 7, constant_steps: 0, min_lr: 1.0e-6}"
    made = optimizer(check(toy_config("optim.weight_decay=0.25", "trainer.precision=bf16-mixed", sched)))
    assert (made.config.weight_decay, made.config.lr, made.config.bf16) == (0.25, 3e-3, True)
    assert made.lr_scheduler.warmup_steps == 7 and math.isclose(made.lr_scheduler.min_lr, 1e-6)


def test_model_options_and_reduction_fields_arrive():
    options = ["model.recompute=full", "+model.options.recompute_num_layers=2", "+ddp.bucket_size=7"]
    config = check(toy_config(*options))
    gpt = describe(config)
    assert (gpt.recompute_granularity, gpt.recompute_num_layers) == ("full", 2)
    assert (reduction(config).bucket_size, reduction(config).overlap_grad_reduce) == (7, True)


def test_rows_are_padded_for_sequence_parallelism_and_for_fp8():
    gpt = describe(check(toy_config()))
    assert gpt.row_multiple == 1
    gpt.tensor_model_parallel_size, gpt.sequence_parallel = 2, True
    assert gpt.row_multiple == 2
    gpt.fp8 = "hybrid"
    assert gpt.row_multiple == 32


@pytest.mark.skipif(HAVE_TRANSFORMER_ENGINE, reason="FP8 is possible here")
def test_fp8_is_refused_where_it_cannot_be():
    assert "Transformer Engine" in message("trainer.precision=bf16-mixed", "trainer.fp8=hybrid", then=describe)


OUR_OWN = ("objective.name=null", "objective._target_=plug_ins.RunningDPG")


@pytest.mark.parametrize(
    ("overrides", "section"),
    [
        ([], {"name": "brain", "gamma": 0.1, "goodness": "bradley_terry", "goodness_center": 0.0}),
        (["objective.name=dpo_sft", "objective.beta=0.5"], {"name": "dpo_sft", "beta": 0.5}),
        (
            [*OUR_OWN, "objective.gamma=0.5"],
            {"_target_": "plug_ins.RunningDPG", "gamma": 0.5, "decay": 0.5},
        ),
        (
            [*OUR_OWN, "objective.gamma=1", "+objective.decay=0.25"],
            {"_target_": "plug_ins.RunningDPG", "gamma": 1, "decay": 0.25},
        ),
    ],
)
def test_an_objectives_options_are_those_given_and_its_own_defaults(overrides, section):
    """Those of another objective do not stand in the way: they are null until someone sets them."""
    assert check(toy_config(*overrides)).objective == section


def test_single_outputs_are_for_objectives_that_take_them():
    single = ("rollout.outputs_per_prompt=1", "objective.gamma=1")
    assert "rollout.outputs_per_prompt must be at least 2" in message(*single)
    assert check(toy_config(*single, *OUR_OWN)).rollout.outputs_per_prompt == 1


def scheduled(steps: int, sched: str) -> None:
    check_schedule(optimizer(check(toy_config(f"optim.sched={{{sched}}}"))), steps)


@pytest.mark.parametrize(
    ("sched", "said"),
    [
        ("name: CosineAnnealing, warmup_steps: 1, constant_steps: 0, min_lr: 1.0", "lower than the minimum"),
        ("name: WarmupPolicy, warmup_ratio: 0.1", "particular number of step or ratio"),
        ("name: T5InverseSquareRootAnnealing", "TypeError"),
    ],
)
def test_a_schedule_that_nemo_cannot_compute_is_refused_before_training(sched, said):
    with pytest.raises(ValueError, match=r"^optim\.sched: .*" + said):
        scheduled(12, sched)


def test_nemos_default_schedules_are_warned_about_where_the_run_is_shorter():
    """CosineAnnealing ends in 80,000 steps at min_lr: a run of fewer would be there from its third step on."""
    with pytest.warns(UserWarning, match=r"=2 and optim\.sched\.constant_steps=80000: the run has 12 steps"):
        scheduled(12, "name: CosineAnnealing, warmup_steps: 2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scheduled(12, "name: CosineAnnealing, warmup_steps: 2, constant_steps: 0")


@pytest.mark.parametrize("name", ["max_steps", "interval", "frequency", "monitor"])
def test_what_would_be_ignored_of_a_schedule_or_lost_on_resume_is_refused(name):
    assert f"optim.sched.{name}: " in message(f"optim.sched={{name: WarmupPolicy, {name}: 2}}", then=optimizer)
