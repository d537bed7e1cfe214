"""The language model's runs: which they are, that none is made twice, their intervals, and the page."""

from __future__ import annotations

import json
import operator
from multiprocessing.process import active_children
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.lm import bands, page
from experiments.lm.plan import Plan
from experiments.lm.pool import Pool
from experiments.page import with_block
from experiments.results import Results

FOLDER = Path(page.__file__).parent
PLAN = Plan(yaml.safe_load((FOLDER / "settings.yaml").read_text()), {"synopses": "s-1", "scitldr": "t-1", "hh": "h-1"})


def trained(run: dict) -> dict:
    """A result that says what the run was: a larger coefficient and rate score higher."""
    value = next(v for k, v in run["objective"].items() if k in ("gamma", "beta", "delta"))
    tuning = {"reward": value + 100 * run["rate"], "kl": 0.0, "gold": 0.0, "win": 0.0}
    heldout = {key: [value, 2 * value, 3 * value, 5 * value] for key in ("reward", "gold", "win", "kl")}
    return {"tuning": tuning, "heldout": heldout, "log_ratio": value, "tokens": 9.0, "seconds": 60}


def with_runs(path: Path, *stages) -> Results:
    results = Results(path)
    for stage in stages:
        for run in stage(results):
            results.get(run, lambda run=run: trained(run))
    return results


def grid(results: Results) -> list[dict]:
    return [run for runs in PLAN.grid().values() for run in runs]


def test_a_failed_run_loses_nothing_else_and_no_run_is_made_twice(tmp_path):
    path, make = tmp_path / "result.json", operator.itemgetter("value")
    runs = [{"seed": seed, "value": 10 * seed} for seed in range(4)]
    with pytest.raises(KeyError), Pool(2) as pool:
        pool.fill(Results(path), make, [*runs[:3], {"seed": 9}])
    kept = [run["settings"] for run in json.loads(path.read_text())]
    assert all(run in runs[:3] for run in kept)
    results = Results(path)
    with Pool(2) as pool:
        pool.fill(results, make, [*runs, runs[3]])
        assert len(results) == 4 and results[runs[3]] == 30
        pool.fill(results, operator.itemgetter("nothing"), runs)  # would fail if it were called
    assert not active_children()


def test_tuning_chooses_by_the_tuning_prompts_and_every_method_has_the_same_grid(tmp_path):
    results = with_runs(tmp_path / "r.json", grid)
    grids = PLAN.grid()
    assert {len(runs) for runs in grids.values()} == {4}
    assert {(run["passes"], run["prompts_per_iteration"], run["draws"]) for runs in grids.values() for run in runs} == {
        (PLAN.settings["train"]["passes"], PLAN.settings["train"]["prompts_per_iteration"], 8)
    }
    for name, run in PLAN.chosen(results).items():
        assert run == grids[name][-1], "the largest value and rate, as made up"
        assert {task: runs[name]["objective"] for task, runs in PLAN.compared(results).items()} == {
            task: run["objective"] for task in PLAN.worlds
        }
    assert PLAN.score({"reward": 1.0, "kl": 2.0}) == 1.0 - 2 * PLAN.settings["score_gamma"]


def test_what_needs_the_tuning_cannot_be_planned_before_it(tmp_path):
    with pytest.raises(KeyError):
        PLAN.compared(Results(tmp_path / "r.json"))


def test_win_rate_runs_take_nested_subsets_of_the_priors_file(tmp_path):
    runs = PLAN.win_rates(with_runs(tmp_path / "r.json", grid))
    sizes = PLAN.settings["win_rate"]["sizes"]
    assert [key for key in runs] == [(design, n) for design in ("prompts", "outputs") for n in sizes]
    for (design, n), some in runs.items():
        assert {run["refresh"] for run in some} == {"never"}
        assert {(run["n"], run["draws"]) for run in some} == {(n, n if design == "prompts" else max(sizes))}
    assert runs["prompts", max(sizes)] == runs["outputs", max(sizes)], "made once"


def test_a_blocks_numbers_come_with_its_last_run(tmp_path, monkeypatch):
    path = tmp_path / "figures-lm.md"
    path.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in ["lm-made", *page.BLOCKS]))
    monkeypatch.setattr(page, "LM_PAGE", path)
    results = with_runs(tmp_path / "r.json", grid)
    page.fill(PLAN, results)
    assert path.read_text().count("Not made yet.") == len(page.BLOCKS)
    for run in PLAN.priors().values():
        heldout = {"reward": [0.1, 0.2, 0.0, 0.1], "gold": [0.5] * 4, "win": [0.25] * 4, "kl": [0.0] * 4}
        about = {"unit": 0.3, "mean": 0.2, "correlation": 0.7}
        best = {"1": [0.0] * 4, "8": [1.0] * 4}
        results.put(run, {"heldout": heldout, "best_of": best, "about": about, "tokens": 9.0, "seconds": 60})
    results = with_runs(tmp_path / "r.json", grid)
    page.fill(PLAN, results)
    text = path.read_text()
    assert text.count("Not made yet.") == 2 and "package synopses, 4 held-out prompts" in text
    assert "Not made yet: SciTLDR, HH dialogues." in text
    assert f"{len(results)} runs, {len(results)} minutes" in text
    assert "| n | 1 | 8 |\n| --- | --- | --- |\n| KL at most | 0.00 | 1.20 |" in text
    assert (tmp_path / "figures" / "lm-figure2.svg").read_text().startswith("<?xml")


def test_the_committed_page_is_that_of_the_committed_runs():
    text, results = page.LM_PAGE.read_text(encoding="utf-8"), Results(FOLDER / "result.json")
    minutes = sum(result["seconds"] for result in results.all()) / 60
    assert f"{results.made()}; {len(results)} runs, {minutes:.0f} minutes" in text
    for name in page.BLOCKS:
        with_block(text, name, "")  # it has the block
        if name != "lm-tasks":
            assert f"(figures/{name}.svg)" in text


# Intervals.


def test_a_band_sets_a_better_frontier_apart_and_not_an_equal_one():
    random = np.random.default_rng(0)
    prompts = random.normal(size=64)

    def runs(gain: float) -> list[dict]:
        return [
            {
                "kl": (kl + 0.1 * random.normal(size=64)).tolist(),
                "reward": (prompts + gain * kl**0.5 + 0.2 * random.normal(size=64)).tolist(),
            }
            for kl in (0.5, 1.0, 2.0)
        ]

    ours = runs(1.0)
    better = bands.frontier_band(ours, runs(0.5), prompts.tolist())
    assert (better.difference_K - better.half_K)[5:].min() > 0
    assert better.difference_K[-1] == pytest.approx(0.5 * 2**0.5, abs=0.1)
    equal = bands.frontier_band(ours, runs(1.0), prompts.tolist())
    assert (np.abs(equal.difference_K) <= equal.half_K).all()


def test_a_slope_is_clustered_by_prompt():
    """Prompts that differ in level alone leave no doubt; prompts with slopes of their own do."""
    level = np.linspace(0, 1, 20)
    flat = {n: [(level + 0.1 * np.log2(n)).tolist()] * 2 for n in (2, 4, 8)}
    assert bands.slope(flat) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    own = {n: [(level * np.log2(n)).tolist()] * 2 for n in (2, 4, 8)}
    mean, half = bands.slope(own)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(2.093 * level.std(ddof=1) / 20**0.5, rel=1e-3)
