"""Every benchmark runs, at toy sizes, and the pages show what it found. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common, gamma, page

ROOT = Path(__file__).resolve().parents[2]
TRL = ROOT / "benchmarks" / ".venv-trl" / "bin" / "python"


def measured(tables: list[str], scratch: Path) -> tuple[dict[str, dict], str]:
    command = [sys.executable, "benchmarks/run.py", *tables, "--smoke", "--profile"]
    command += ["--results", str(scratch)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = [scratch / "benchmarks.md", scratch / "benchmarks_tables.md"]
    assert all(path.read_text().count("\n## ") >= len(tables) for path in pages)
    return {t: json.loads((scratch / f"{t}.json").read_text()) for t in tables}, "".join(p.read_text() for p in pages)


@pytest.mark.slow
def test_every_table_runs_and_is_on_the_pages(tmp_path):
    tables = ["step", "layouts", "logprobs", "sampling", "guards", "checkpoints", "scaling", "calculated"]
    results, text = measured(tables, tmp_path)
    for name, result in results.items():
        assert f"## {result['title']}" in text and f"`python benchmarks/run.py {name} --smoke`" in text
        for part in result["parts"]:
            keys = [key for key, *_ in part["columns"]]
            assert part["rows"] and all(set(row) & set(keys) for row in part["rows"])
        for target in result["targets"]:
            assert target["what"] in text
    assert {name for name in results if results[name]["targets"]} == set(tables) - {
        "checkpoints",
        "scaling",
        "calculated",
    }
    assert "aten::" in text, "profiles"


@pytest.mark.skipif(not TRL.exists(), reason="bash benchmarks/install_trl.sh makes TRL's environment")
def test_the_comparison_with_trl_runs(tmp_path):
    results, _ = measured(["trl"], tmp_path)
    assert {row["name"] for row in results["trl"]["parts"][0]["rows"]} == {"BRAIn", "TRL RLOO", "TRL DPO"}


@pytest.mark.slow
def test_the_table_of_gammas_has_a_line_for_each_and_makes_no_run_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gamma, "GAMMAS", (0.05, 0.2))
    toy = ["--config-name=toy", "trainer.max_iterations=2"]
    gamma.main([str(tmp_path), *toy])
    printed = capsys.readouterr().out
    small, large = (line.split(" | ") for line in printed.strip().splitlines()[-2:])
    assert (small[0], large[0]) == ("| 0.05", "| 0.2")
    assert float(small[1]) < float(large[1]), "a smaller gamma rests on fewer outputs"
    made = {path: path.stat().st_mtime for path in tmp_path.glob("*/metrics.jsonl")}
    gamma.main([str(tmp_path), *toy])
    assert capsys.readouterr().out == printed == (tmp_path / "table.md").read_text() + "\n"
    assert {path: path.stat().st_mtime for path in made} == made


def test_cases_take_turns_and_keep_within_their_seconds():
    order = []
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 7.0}
    times = common.interleaved(cases, repeats=3)
    assert "".join(order) == "ab" * 4, "one warm-up, three rounds"
    assert times["b"] == [7.0] * 3, "a case may be its own clock"
    assert len(common.interleaved(cases, repeats=3, seconds=0)["a"]) == 1
    assert common.ratio([2.0, 4.0, 3.0], [1.0, 4.0, 1.0]) == {"median": 3.0, "low": 1.5, "high": 2.5, "repeats": 3}


def test_peak_memory_counts_what_a_call_frees_again():
    peak = common.fresh(lambda: common.peak_extra(lambda: bytearray(50 * 2**20)))
    # The kernel counts in batches of some hundred kilobytes, and pages of the interpreter itself come and go.
    assert 49 * 2**20 <= peak < 60 * 2**20


def test_a_failing_process_is_reported():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        common.fresh(lambda: 1 / 0, ranks=2)


def test_targets():
    assert page.met({"value": {"median": 1.0}, "at_most": 1.05}) and not page.met({"value": 1.9, "at_least": 2.0})
