"""The figures' results: kept run by run, made once, and what stands in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments import __main__ as command
from experiments import page, sweep
from experiments.results import Results

SWEEPS = [name for name in command.FIGURES if name != "figure3"]


def test_a_run_is_made_once_and_a_killed_runner_loses_only_the_one_at_work(tmp_path):
    path = tmp_path / "result.json"
    Results(path).get({"seed": 0}, lambda: {"kl": 1 / 3})

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Results(path).get({"seed": 1}, killed)
    results = Results(path)
    assert results.get({"seed": 0}, killed) == {"kl": 0.333333}
    assert results.get({"seed": 1}, lambda: {"kl": 2}) == {"kl": 2}
    assert [run["settings"] for run in json.loads(path.read_text())] == [{"seed": 0}, {"seed": 1}]
    assert len(Results(path)) == 2 and "torch" in results.made()


def test_the_best_reward_within_a_budget_is_over_all_checkpoints():
    pairs = [[(0.0, 0.0), (0.9, 3.0)], [(0.4, 1.0), (2.0, 9.0)]]
    runs = [[{"kl": kl, "reward": reward} for kl, reward in run] for run in pairs]
    assert sweep.reward_within(runs, [0.5, 1.0]) == (1.0 + 3.0) / 2


def test_an_interval_of_few_seeds_is_students():
    mean, half = sweep.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-4))


def test_a_rate_is_chosen_by_the_tuning_prompts_alone(tmp_path, monkeypatch):
    """The run of the best score; the reported prompts' runs come after, with that rate."""
    made = []

    def train(world, run, gammas):
        made.append((run["prompts"], run["rate"]))
        return [{"regret": abs(run["rate"] - 0.01), "kl": 0.0, "reward": 0.0}], None

    monkeypatch.setattr(sweep, "train", train)
    settings = yaml.safe_load((command.FOLDER / "baseline" / "settings.yaml").read_text())
    settings["methods"] = dict(list(settings["methods"].items())[:1])
    world = type("World", (), {"name": "none"})()
    ((rate, (curve,)),) = sweep.sweep(world, settings, Results(tmp_path / "result.json")).values()
    assert rate == 0.01 and len(curve.runs) == len(settings["seeds"])
    rates = [("tuning", rate) for rate in settings["tuning"]["rates"]]
    assert made == rates + [("reported", 0.01)] * len(settings["seeds"])


@pytest.mark.parametrize("name", SWEEPS)
def test_methods_have_equal_grids_outputs_and_steps(name):
    settings = yaml.safe_load((command.FOLDER / name / "settings.yaml").read_text())
    methods = settings["methods"]
    assert len({(len(m["values"]), len(m.get("tuned_at", []))) for m in methods.values()}) == 1
    assert not set(settings["seeds"]) & set(settings["tuning"]["seeds"])
    if name != "figure4":  # whose designs differ in outputs on purpose
        assert all("draws" not in m for m in methods.values())


@pytest.mark.parametrize("name", SWEEPS)
def test_no_checkpoint_of_the_committed_runs_is_above_the_bound(name):
    runs = json.loads((command.FOLDER / name / "result.json").read_text())
    assert runs and all(point["slack"] >= -1e-9 for run in runs for point in run["result"])


@pytest.mark.parametrize("name", command.FIGURES)
def test_the_page_is_that_of_the_committed_runs(name):
    results = Results(command.FOLDER / name / "result.json")
    text = page.PAGE.read_text(encoding="utf-8")
    assert f"`python -m experiments {name}`: {results.made()}; {len(results)} runs." in text
    if name != "baseline":
        chart = Path(page.PAGE.parent / "figures" / f"{name}.svg")
        assert f"(figures/{name}.svg)" in text and chart.read_text().lstrip().startswith("<?xml")


def test_a_page_without_the_block_is_refused():
    assert page.with_block("a <!-- x -->\nold\n<!-- end --> b", "x", "new") == "a <!-- x -->\n\nnew\n\n<!-- end --> b"
    with pytest.raises(ValueError, match="no block 'y'"):
        page.with_block("text", "y", "new")
