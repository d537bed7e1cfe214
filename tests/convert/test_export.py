"""An exported model is the model: bit for bit in its tensors, and transformers computes what Megatron computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from models import (
    LLAMA_LIKE,
    ONE,
    PP2,
    TEXTS,
    TOKENS,
    TP2,
    VIRTUAL_PP2,
    VOCAB,
    build,
    exported_logits,
    llama,
    padded,
    tensors_of,
    write_gguf,
)
from ranks import run_ranks
from toy_runs import toy_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nemo_brain.convert import export as export_file
from nemo_brain.convert.export import export_model, make_export
from nemo_brain.convert.fields import gelu_tanh
from nemo_brain.convert.open import open_weights
from nemo_brain.core.groups import Group, Output, Prompt
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import load_weights
from nemo_brain.training.brain.run import run


def reexport(source: Path, layouts: list[tuple], target: Path, shard_bytes: int) -> None:
    """Reads ``source`` into each layout and writes it again, to target/0, target/1 ..."""
    weights = open_weights(source)
    for number, layout in enumerate(layouts):
        chunks = build(weights.gpt_config, weights.vocab_size, layout)
        load_weights(chunks, weights)
        export = make_export(chunks[0].config, weights.vocab_size, byte_tokenizer(), "test")
        export_model(chunks, export, target / str(number), shard_bytes)
        # A second data-parallel replica writes nothing, and all ranks return after the directory is there.
        assert (target / str(number) / "config.json").is_file()


@pytest.fixture(scope="module", params=[(False, torch.float32), (True, torch.bfloat16)], ids=["untied", "tied, bf16"])
def original(request, tmp_path_factory) -> Path:
    """A random Llama of 130 tokens, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("llama")
    tied, dtype = request.param
    llama(tied).to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("ranks", "layouts"), [(1, [ONE]), (2, [ONE, TP2, PP2, VIRTUAL_PP2])], ids=["1 rank", "2 ranks"]
)
def test_what_was_imported_is_exported_bit_for_bit(original, tmp_path, ranks, layouts):
    expected = tensors_of(original)
    dtype = next(iter(expected.values())).dtype
    # Megatron's parameters have the run's dtype; fp32 holds every bf16 number.
    run_ranks(reexport, ranks, original, layouts, tmp_path, 60_000)
    for number in range(len(layouts)):
        directory = tmp_path / str(number)
        found = tensors_of(directory)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.float()), (layouts[number], name)
        assert found["model.embed_tokens.weight"].shape[0] == 130 < padded(130, 1)
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        files = {file.name: file.stat().st_size for file in directory.glob("*.safetensors")}
        assert set(index["weight_map"].values()) == files.keys() and len(files) > 3
        assert sorted(files)[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert max(files.values()) < 60_000 + 5_000, "a header besides"
        assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in found.values())
        ours, theirs = (json.loads((path / "config.json").read_text()) for path in (directory, original))
        ignored = {"torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
        assert {k: v for k, v in ours.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }
        assert ours.get("dtype", ours.get("torch_dtype")) == "float32"
        assert open_weights(directory).gpt_config == open_weights(original).gpt_config
    assert dtype in (torch.float32, torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(len(layouts))], "nothing else"


def test_a_gguf_file_is_exported_as_the_directory_it_came_from(tmp_path):
    run_ranks(reexport, 1, write_gguf(tmp_path / "llama.gguf"), [ONE], tmp_path, 10**9)
    found, expected = tensors_of(tmp_path / "0"), llama(tied=False).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def bf16_export(target: Path) -> None:
    weights = RandomWeights(LLAMA_LIKE, VOCAB, byte_tokenizer(), seed=3)
    chunks = build(LLAMA_LIKE, VOCAB, ONE)
    load_weights(chunks, weights)
    chunks[0].bfloat16()  # as Megatron's Float16Module does
    export_model(chunks, make_export(chunks[0].config, VOCAB, weights.tokenizer, "test"), target)


def test_the_models_own_dtype_is_written(tmp_path):
    run_ranks(bf16_export, 1, tmp_path / "model")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "model").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", torch_dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.compatibility
@pytest.mark.parametrize(
    ("changes", "layout", "act"),
    [
        ({}, VIRTUAL_PP2, "gelu"),
        ({"share_embeddings_and_output_weights": True, "rotary_base": 500}, TP2, "gelu"),
        ({"activation_func": F.silu, "kv_channels": 12, "layernorm_epsilon": 1e-3}, PP2, "silu"),
        ({"activation_func": F.relu, "num_query_groups": None}, ONE, "relu"),
        ({"bias_activation_fusion": True}, ONE, "gelu_pytorch_tanh"),
    ],
    ids=["virtual stages", "tied, TP2", "silu, wide heads, PP2", "relu", "fused gelu"],
)
def test_transformers_computes_the_same_logits(tmp_path, changes, layout, act):
    target = tmp_path / "model"
    logits = run_ranks(exported_logits, layout[0] * layout[1], {**LLAMA_LIKE, **changes}, layout, target)[-1]
    model = AutoModelForCausalLM.from_pretrained(target)
    assert isinstance(model, LlamaForCausalLM) and model.config.hidden_act == act
    with torch.no_grad():
        expected = model(TOKENS).logits
    # fp32 in another order of summation, on logits of up to 5.
    torch.testing.assert_close(logits[..., :VOCAB], expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 1, "the comparison is not about zeros"
    activation = open_weights(target).gpt_config["activation_func"]
    assert activation is (gelu_tanh if act == "gelu_pytorch_tanh" else changes.get("activation_func", F.gelu))


def test_the_tokenizer_is_the_same(tmp_path):
    run_ranks(bf16_export, 1, tmp_path / "model")
    ours, theirs = byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids
        assert theirs.decode(ours(text).input_ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (256, 257, VOCAB)
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    # Servers take sampling defaults from here: there are none.
    assert generation.pop("transformers_version") and generation == {"eos_token_id": 256, "pad_token_id": 257}


def failing_export(target: Path, shard_bytes: int) -> str:
    """An export whose third file cannot be written; returns the error that this rank saw."""
    written = []

    def save(tensors, file, metadata):
        written.append(file)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata=metadata)

    save_file, export_file.save_file = export_file.save_file, save
    chunks = build(LLAMA_LIKE, VOCAB, PP2)
    export = make_export(chunks[0].config, VOCAB, byte_tokenizer(), "test")
    with pytest.raises(OSError) as caught:
        export_model(chunks, export, target, shard_bytes)
    return str(caught.value)


def test_a_failed_export_leaves_the_earlier_one_and_fails_on_every_rank(tmp_path):
    target = tmp_path / "model"
    run_ranks(exported_logits, 1, LLAMA_LIKE, ONE, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for message in run_ranks(failing_export, 2, target, 20_000):
        assert str(target) in message and "No space left on device" in message
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert list(tmp_path.iterdir()) == [target], "the incomplete one is gone"
    # The next one replaces it; what a killed run left beside it does no harm.
    (tmp_path / ".model.incomplete").mkdir()
    (tmp_path / ".model.incomplete" / "0.safetensors").write_bytes(b"half")
    run_ranks(exported_logits, 1, {**LLAMA_LIKE, "init_method_std": 0.1}, ONE, target)
    after = {path.name: path.read_bytes() for path in target.iterdir()}
    assert after.keys() == before.keys() and after["model.safetensors"] != before["model.safetensors"]
    assert list(tmp_path.iterdir()) == [target]


def export_over(target: Path) -> None:
    with pytest.raises(ValueError, match=r"exists and is not an earlier export"):
        exported_logits(LLAMA_LIKE, ONE, target)


def test_only_an_earlier_export_is_replaced(original, tmp_path):
    shutil.copytree(original, tmp_path / "start")
    before = sorted(tmp_path.rglob("*"))
    run_ranks(export_over, 1, tmp_path / "start")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=r"model\.export_to: \S+start exists and is not an earlier export"):
        run(toy_config(f"model.export_to={tmp_path}/start", f"run_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists(), "refused before training"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"normalization": "LayerNorm"}, r"llama cannot express normalization='LayerNorm', only 'RMSNorm'"),
        ({"gated_linear_unit": False}, r"gated_linear_unit=False"),
        ({"parallel_residual": True}, r"parallel_residual=True"),
        ({"position_embedding_type": "learned_absolute"}, r"position_embedding_type='learned_absolute'"),
        ({"rotary_percent": 0.5}, r"rotary_percent=0\.5"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, r"qk_layernorm=True with \S+ and add_qkv_bias=True"),
        ({"layernorm_zero_centered_gamma": True}, r"layernorm_zero_centered_gamma=True"),
        ({"activation_func": F.elu}, r"activation_func=elu, only silu, gelu, relu"),
    ],
)
def test_what_a_llama_cannot_express_is_named(change, match):
    config = PackedGPTConfig(**{**LLAMA_LIKE, **change}, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=rf"^model\.export_to: .*{match}.*model\.export_to=null"):
        make_export(config, VOCAB, byte_tokenizer(), "model.export_to")


def test_a_run_that_cannot_be_exported_is_refused_before_it_starts(tmp_path):
    config = toy_config(
        f"model.export_to={tmp_path}/model", f"run_dir={tmp_path}/run", "model.gpt.normalization=LayerNorm"
    )
    with pytest.raises(ValueError, match=r"model\.export_to: .*normalization='LayerNorm'"):
        run(config)
    assert not (tmp_path / "run").exists()


PROMPT = Prompt("p", "name", list(b"name"))
OUTPUTS = [Output([*text.encode(), 256], text, True) for text in ("a letter", "", "ETAOIN shrdlu", "Straße")]


class LastLogprobs(pl.Callback):
    """log q of OUTPUTS by the training kernels, when training has ended."""

    def on_train_end(self, trainer, module) -> None:
        group = Group(PROMPT, OUTPUTS)
        # One group for each data-parallel rank.
        self.logprobs = trainer.strategy.policy_logprobs([group, group], (1.0,), lambda tokens: None)[0]


def trained(run_dir: Path, export_to: Path, *overrides: str) -> list[float]:
    last = LastLogprobs()
    run(toy_config(f"run_dir={run_dir}", f"model.export_to={export_to}", *overrides), callbacks=[last])
    return last.logprobs[0].tolist()


def teacher_forced(model: LlamaForCausalLM, output: Output) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT.token_ids + output.token_ids])).logits[0]
    logprobs = logits[len(PROMPT.token_ids) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(output.token_ids)[:, None]).sum().item()


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.tensor_model_parallel_size=2", "prior.placement=offload"),
        ("optim.use_distributed_optimizer=true", "ddp.overlap_param_gather=true"),
    ],
    ids=["TP2, prior offloaded", "DP2, overlapped gather"],
)
def test_a_run_exports_its_trained_policy(tmp_path, overrides):
    """From scratch; teacher forcing by plain transformers gives the log-probs that our kernels give."""
    target = tmp_path / "policy"
    short = ("trainer.max_iterations=2", "optim.lr=1e-2")
    logprobs = run_ranks(trained, 2, tmp_path / "run", target, *short, *overrides)[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert isinstance(model, LlamaForCausalLM) and len(tokenizer) == VOCAB
    start = RandomWeights(dict(toy_config().model.gpt), VOCAB, tokenizer, seed=0)
    untrained = AutoModelForCausalLM.from_pretrained(target)
    untrained.model.embed_tokens.weight.data = start.tensor("embedding.word_embeddings.weight", (VOCAB, 32))
    for output, ours in zip(OUTPUTS, logprobs, strict=True):
        # fp32, sums of up to 14 log-probs of about -5.5.
        assert abs(teacher_forced(model, output) - ours) < 1e-4
        # The comparison tells trained weights from the start model's.
        assert abs(teacher_forced(untrained, output) - ours) > 1e-2
