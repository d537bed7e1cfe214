"""A run's checkpoint, read in one process whatever layout wrote it, is the model that the run exports."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from demonstrations import sft_config, write_demonstrations
from models import damaged_llama, tensors_of
from ranks import run_ranks
from toy_runs import toy_config

from nemo_brain.convert.command import main
from nemo_brain.convert.open import open_weights
from nemo_brain.durability import checkpoint
from nemo_brain.training.brain.run import run
from nemo_brain.training.sft.run import fine_tune

RUN = (
    "trainer.max_iterations=1",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=4",
    "train.epochs_per_iteration=1",
    "data.holdout=0",
    "checkpoint.every_steps=1",
)
TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VIRTUAL = "model.virtual_pipeline_model_parallel_size=2"
DISTRIBUTED = "optim.use_distributed_optimizer=true"
LAYOUTS = {
    "TP2": (2, [TP2]),
    "PP2, 2 virtual stages": (2, [PP2, VIRTUAL]),
    "DP2, distributed optimizer, bf16": (2, [DISTRIBUTED, "trainer.precision=bf16-mixed"]),
}


def train(directory: Path, *overrides: str) -> None:
    logging.disable(logging.WARNING)
    run(toy_config(f"run_dir={directory}", f"model.export_to={directory}/model", *RUN, *overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run at TP2 with its export; checkpoints of steps 2 (the last) and 1."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(train, 2, directory, TP2)
    assert len(checkpoint.complete(directory / "checkpoints")) == 2
    return directory


def equal(one: Path, other: Path) -> bool:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def compare(run_dir: Path, target: Path) -> None:
    """Every file is the one that the run exported, to the last bit."""
    assert equal(target, run_dir / "model")
    for file in target.iterdir():
        assert file.read_bytes() == (run_dir / "model" / file.name).read_bytes(), file.name


@pytest.mark.compatibility
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_is_the_export_bit_for_bit(layout, tmp_path, finished, capsys):
    directory, (ranks, overrides) = finished, LAYOUTS[layout]
    if layout != "TP2":
        directory = tmp_path / "run"
        run_ranks(train, ranks, directory, *overrides)
    main([f"from={directory}", f"to={tmp_path}/converted"])
    compare(directory, tmp_path / "converted")
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_checkpoint_a_directory_of_them_and_a_run_are_accepted(finished, tmp_path):
    newest, older = checkpoint.complete(finished / "checkpoints")
    for number, source in enumerate((finished, finished / "checkpoints", newest)):
        main([f"from={source}", f"to={tmp_path}/{number}"])
        assert equal(tmp_path / str(number), finished / "model")
    main([f"from={older}", f"to={tmp_path}/older"])
    assert not equal(tmp_path / "older", finished / "model")


def test_a_damaged_checkpoint_is_refused_or_left_out_for_the_one_before(finished, tmp_path):
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    newest, older = checkpoint.complete(directory / "checkpoints")
    main([f"from={older}", f"to={tmp_path}/older"])
    weights = max((newest / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"^from: no intact checkpoint: .* is not what was written \(checksum\)"):
        main([f"from={newest}", f"to={tmp_path}/newest"])
    assert not (tmp_path / "newest").exists()
    with pytest.warns(UserWarning, match="checkpoint left out: .* is not what was written"):
        main([f"from={directory}", f"to={tmp_path}/run-converted"])
    assert equal(tmp_path / "run-converted", tmp_path / "older")


def test_a_run_starts_from_a_checkpoint_and_its_own_says_so(finished, tmp_path):
    """In another layout; the second run's architecture is that of the first one's start model."""
    start = ["model.gpt=null", "optim.lr=1e-30"]
    run_ranks(train, 2, tmp_path / "next", PP2, f"model.restore_from={finished}", *start)
    assert equal(tmp_path / "next" / "model", finished / "model")
    main([f"from={tmp_path}/next", f"to={tmp_path}/converted"])
    compare(tmp_path / "next", tmp_path / "converted")


def test_a_checkpoint_with_a_tensor_that_is_not_finite_is_refused(tmp_path):
    """Of a run that was allowed to start from it, and whose data does not touch it."""
    start = damaged_llama(tmp_path / "start")

    def fine_tuned() -> None:
        data = (f"data.train={write_demonstrations(tmp_path / 'data.jsonl')}", "validation.samples=0")
        sizes = ("data.max_prompt_tokens=16", "data.max_output_tokens=16", "train.global_batch_size=16")
        model = (f"model.restore_from={start}", "model.allow_nonfinite=true", "data.template=null")
        fine_tune(sft_config(f"run_dir={tmp_path}/run", *data, *sizes, *model, "optim.lr=1e-3"))

    run_ranks(fine_tuned, 1)
    name = "embedding.word_embeddings.weight"
    match = rf"step_\d+/weights: {name} is not finite: \d+ of \d+ values .* with model\.allow_nonfinite=true"
    with pytest.raises(ValueError, match=match):
        open_weights(tmp_path / "run").tensor(name, ())
    assert open_weights(tmp_path / "run", None).tensor(name, ()).isnan().any(1).nonzero().tolist() == [[ord("~")]]
    with pytest.raises(ValueError, match=r"with allow_nonfinite=true"):
        main([f"from={tmp_path}/run", f"to={tmp_path}/converted"])


def test_a_start_model_that_is_gone_is_named(finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "start")
    run_ranks(train, 1, tmp_path / "next", f"model.restore_from={tmp_path}/start", "model.gpt=null")
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(ValueError, match=r"step_000000002: architecture and tokenizer are .* \S+/start is"):
        open_weights(tmp_path / "next")
