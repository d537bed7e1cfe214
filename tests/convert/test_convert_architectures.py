"""Each architecture is transformers' own: logits, gradients, packed log-probs in every layout, tensors bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, GROUPS, TOKENS, VOCAB, random_model
from layouts import PP2, SP, TP2, VIRTUAL
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
from models import tensors_of
from parity import texts
from ranks import run_ranks
from toy_runs import recorded_run
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from nemo_brain.convert.export import export_model, make_export
from nemo_brain.convert.open import open_weights
from nemo_brain.core.groups import Group
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.host.options import INTERLEAVED
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.parameters import global_parameters
from nemo_brain.model.passes import GroupPasses
from nemo_brain.model.weights import load_weights

# Tensor-parallel size, stages, virtual stages per stage, sequence parallelism.
LAYOUTS = {
    1: [(1, 1, None, False)],
    2: [(2, 1, None, False), (2, 1, None, True), (1, 2, None, False), (1, 2, 2, False)],
}


def sequence_logprobs(model: PreTrainedModel, group: Group) -> list[float]:
    """Teacher forcing by plain transformers."""
    results = []
    for output in group.outputs:
        logits = model(torch.tensor([group.prompt.token_ids + output.token_ids])).logits[0]
        logprobs = logits[len(group.prompt.token_ids) - 1 : -1].log_softmax(-1)
        results.append(logprobs.gather(1, torch.tensor(output.token_ids)[:, None]).sum().item())
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Each model's directory, and what transformers computes of it."""
    models = {}
    for name, config in CONFIGS.items():
        path = tmp_path_factory.mktemp("model")
        model = random_model(config)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        logits = model(TOKENS[None]).logits[0]
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            logprobs = [sequence_logprobs(model, group) for group in GROUPS]
        models[name] = path, {"logits": logits.detach(), "gradients": gradients, "logprobs": logprobs}
    return models


def build(path: Path, layout: tuple) -> tuple[list, PackedGPTConfig]:
    tensor_parallel, stages, virtual, sequence_parallel = layout
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_parallel, stages, virtual)
    model_parallel_cuda_manual_seed(1)
    weights = open_weights(path)
    config = PackedGPTConfig(
        **weights.gpt_config,
        **(INTERLEAVED if virtual else {}),
        vocab_size=weights.vocab_size,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
    )
    chunks = [config.configure_model(None, vp_stage=stage).eval() for stage in range(virtual or 1)]
    load_weights(chunks, weights)
    return chunks, config


def packed_logits(chunks: list) -> torch.Tensor | None:
    """Logits [S, V] of TOKENS as one packed row, on the last stage; activations are sent by hand."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    length, config = len(TOKENS), chunks[0].config
    local = length // config.tensor_model_parallel_size if config.sequence_parallel else length
    layout = torch.tensor([[length]])
    for step in range(len(chunks) * stages):
        if step % stages != rank:
            continue
        chunk = chunks[step // stages]
        if step > 0 and stages > 1:
            hidden = torch.empty(local, 1, config.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        output = chunk(TOKENS[None], torch.arange(length)[None], layout, torch.arange(length))
        if step == len(chunks) * stages - 1:
            return gather_from_tensor_model_parallel_region(output)[:, :VOCAB]
        torch.distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def computed(models: dict[str, Path], layouts: list[tuple], target: Path) -> dict:
    """By model and layout what Megatron computes; each model is exported to target/NAME/LAYOUT."""
    results = {}
    for name, path in models.items():
        for number, layout in enumerate(layouts):
            chunks, config = build(path, layout)
            export = make_export(config, VOCAB, byte_tokenizer(), "test")
            export_model(chunks, export, target / name / str(number))
            with torch.no_grad():
                result = {"logits": packed_logits(chunks)}
            for row_layout in ("shared_prefix", "separate_rows"):
                # 60 positions: several micro-batches.
                result[row_layout] = GroupPasses(config, row_layout, 60).logprobs(chunks, GROUPS)[0]
            if torch.distributed.get_world_size() == 1:
                result["gradients"] = gradients(chunks[0], export)
            results[name, layout] = result
    return results


def gradients(chunk, export) -> dict[str, torch.Tensor]:
    """By Hugging Face's names, of the loss that ``saved`` uses."""
    logits = packed_logits([chunk])
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {}
    for parameter in global_parameters(chunk):
        gradient = parameter.parameter.grad
        found |= dict(export.tensors(parameter.name, gradient[:VOCAB] if len(gradient) > VOCAB else gradient))
    return found


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda ranks: f"{ranks} ranks")
def results(request, saved, tmp_path_factory):
    target = tmp_path_factory.mktemp("exports")
    models = {name: path for name, (path, _) in saved.items()}
    return run_ranks(computed, request.param, models, LAYOUTS[request.param], target), target


@pytest.mark.compatibility
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_transformers(results, saved, name):
    expected = saved[name][1]
    for (model, layout), result in results[0][-1].items():
        if model != name:
            continue
        # fp32 in another order of summation: 9e-6 on logits of up to 5, 3e-5 on sums of up to 330 nats.
        assert (result["logits"] - expected["logits"]).abs().max() < 1e-4, layout
        for row_layout in ("shared_prefix", "separate_rows"):
            for ours, theirs in zip(result[row_layout], expected["logprobs"], strict=True):
                assert ours[: len(theirs)].tolist() == pytest.approx(theirs, abs=1e-4, rel=0), (layout, row_layout)
        if "gradients" in result:
            assert result["gradients"].keys() == expected["gradients"].keys()
            for parameter, ours in result["gradients"].items():
                theirs = expected["gradients"][parameter]
                assert (ours - theirs).norm() < 1e-5 * theirs.norm(), parameter  # 2.2e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_imported_is_exported_bit_for_bit(results, saved, name):
    path, expected = saved[name]
    original = tensors_of(path)
    directories = sorted((results[1] / name).iterdir())
    assert len(directories) in (1, 4)
    for directory in directories:
        found = tensors_of(directory)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[tensor], original[tensor]) for tensor in found)
        assert open_weights(directory).gpt_config == open_weights(path).gpt_config
    model = AutoModelForCausalLM.from_pretrained(directories[0], attn_implementation="eager")
    # A Mistral without windows within its positions is a Llama.
    assert model.config.model_type == CONFIGS[name].model_type.replace("mistral", "llama")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS[None]).logits[0], expected["logits"], atol=1e-5, rtol=0)


def test_every_setting_of_the_models_changes_their_logits(saved):
    """So that equal logits are no accident: a model read without one of these settings is another model."""
    changes = {
        "llama3 rope": dict(rope_scaling=None),
        "llama, linear rope, biases": dict(rope_scaling=None),
        "mistral": dict(hidden_act="silu"),
        "qwen3": dict(rope_theta=1e6),
        "gpt_neox": dict(use_parallel_residual=False),
        "gpt_neox, sequential": dict(rotary_pct=0.25),
        "gpt2": dict(layer_norm_epsilon=1e-1),
    }
    for name, change in changes.items():
        path, expected = saved[name]
        config = AutoConfig.from_pretrained(path)
        for key, value in change.items():
            setattr(config, key, value)
        if name == "gpt_neox, sequential":
            config.partial_rotary_factor = config.rotary_pct
        model = AutoModelForCausalLM.from_pretrained(path, config=config)
        with torch.no_grad():
            assert (model(TOKENS[None]).logits[0] - expected["logits"]).abs().max() > 1e-2, name


def recompute_of_modules(path: Path) -> None:
    options = "+model.options.recompute_modules=[core_attn,layernorm]"
    with pytest.raises(ValueError, match=r"model\.options\.recompute_modules: .*set model\.recompute=full"):
        recorded_run(*RUN, f"model.restore_from={path}", "model.recompute=selective", options)


def test_parallel_residuals_refuse_what_they_would_not_recompute(saved):
    run_ranks(recompute_of_modules, 1, saved["gpt_neox"][0])


RUN = (
    "trainer.max_iterations=1",
    "rollout.prompts_per_iteration=4",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=2",
    "train.epochs_per_iteration=1",
    "data.holdout=0",
    "model.gpt=null",
    # These random models are sharp: a higher temperature makes their outputs differ.
    "rollout.temperature=3",
    "optim.adam_eps=1e-3",
)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_training_in_every_layout_equals_one_process(saved, name):
    """Outputs, and gradients of two steps, of biases and of query and key norms under sequence parallelism too."""
    path = saved[name][0]
    expected = run_ranks(recorded_run, 1, *RUN, f"model.restore_from={path}")[0]
    # Sampling with the key-value cache gives the log-probs of teacher forcing, of about 16 nats each.
    gaps = [record["proposal_gap"] for record in expected["metrics"] if "proposal_gap" in record]
    assert gaps and max(map(abs, gaps)) < 1e-4
    for world_size, layouts in {
        1: [["model.recompute=selective"]],
        2: [[TP2], [TP2, SP, "model.recompute=full"], [PP2, VIRTUAL, "model.recompute=full"]],
    }.items():
        for layout in layouts:
            ranks = run_ranks(recorded_run, world_size, *RUN, f"model.restore_from={path}", *layout)
            assert texts(ranks[0]["samples"]) == texts(expected["samples"])
            for step, full in enumerate(expected["gradients"]):
                seen = set()
                for rank in ranks:
                    for parameter, gradient in rank["gradients"][step].items():
                        error = (gradient - full[parameter]).norm() / full[parameter].norm()
                        # fp32; sums over ranks are taken in different orders.
                        assert error < 1e-5, (layout, step, parameter, float(error))
                        seen.add(parameter)
                assert seen == full.keys()
