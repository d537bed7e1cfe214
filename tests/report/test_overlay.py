"""One page about several runs: their curves in the same charts, what differs, how they ended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import Page

from nemo_brain.cli.report import main
from nemo_brain.report.charts import CURVES
from nemo_brain.report.kinds.evaluation import EvaluationReport
from nemo_brain.report.kinds.overlay import OverlayReport
from nemo_brain.report.metrics import MetricsWriter

HOSTILE = "<script>alert('x')</script>"


def run(path: Path, reward: float, gamma: float, iterations: int = 2) -> Path:
    """A BRAIn run's directory, whose held-out reward ends at ``reward``."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run_dir: {path}\nobjective: {{name: brain, gamma: {gamma}}}\nmodel: {{export_to: {path}/model}}\nseed: 0\n"
        f'note: "{HOSTILE}{gamma}"\n'
    )
    writer = MetricsWriter(path)
    for i in range(1, iterations + 1):
        writer.write("step", i, {"iteration": i - 1, "loss": 0.5 / i, "ess_alpha": 1.0 + i})
        writer.write("iteration", i, {"iteration": i - 1, "reward/mean": reward * i / 2, "kl_to_prior": 0.1 * i})
        fields = {"eval/reward": reward * i / iterations, "eval/kl_to_prior": 0.2 * i, "eval/win_rate": 0.75}
        bounds = {f"{name}_ci_{side}": value for name, value in fields.items() for side in ("low", "high")}
        writer.write("eval", i, {"iteration": i, **fields, **bounds})
    return path


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [str(run(tmp_path / name, reward, gamma)) for name, reward, gamma in (("a", 0.5, 0.1), ("b", 0.75, 0.2))]


def overlay(runs: list[str], tmp_path: Path) -> str:
    main([*runs, f"out={tmp_path}/page.html"])
    return (tmp_path / "page.html").read_text()


def test_every_chart_has_a_curve_of_every_run_and_names_it(runs, tmp_path):
    html = overlay(runs, tmp_path)
    page = Page(html)
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert len(labels) == 7 and all(name in label for label in labels for name in runs)
    assert "No data" not in html and "Not there yet" not in html
    assert len(page.ids) == len(set(page.ids))
    assert f"{runs[1]} ends with the highest held-out reward, 0.75" in html


def test_settings_that_differ_are_listed_and_no_others(runs):
    configs = [
        {"run_dir": name, "objective": {"gamma": g}, "x": [1], "to": f"{name}/model"}
        for name, g in zip(runs, (0.1, 0.2), strict=True)
    ]
    configs[1]["only"] = None
    _, settings = OverlayReport([(name, [], c) for name, c in zip(runs, configs, strict=True)]).tables()
    assert settings.columns == ["Key", *runs]
    assert settings.rows == [["objective.gamma", "0.1", "0.2"], ["only", "–", "null"]]


def test_the_ends_are_the_last_evaluations(runs, tmp_path):
    html = re.sub(r"\s+", " ", overlay(runs, tmp_path))
    assert "0.75 (95% CI 0.75 to 0.75)" in html and "0.50 (95% CI 0.50 to 0.50)" in html


def test_it_loads_nothing_and_cannot_be_injected(runs, tmp_path):
    html = overlay(runs, tmp_path)
    page = Page(html)
    assert page.count("script") == 0 and page.count("img") == 0
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "&lt;script&gt;" in html


def test_runs_that_have_only_begun_are_compared_by_what_they_have(runs, tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    MetricsWriter(late).write("step", 1, {"iteration": 0, "loss": 1.0, "ess_alpha": 2.0})
    html = overlay([*runs, str(late)], tmp_path)
    Page(html)
    assert f"{late}: eval records in metrics.jsonl" in html


def test_more_runs_than_colours_differ_in_their_lines():
    report = OverlayReport([(f"run {i}", [{"kind": "step", "step": 1, "loss": 1.0}], {}) for i in range(20)])
    series = report.panels()[-1].series
    assert len({(s.colour, s.style) for s in series}) == 20 and len({s.colour for s in series}) == len(CURVES)
    with pytest.raises(ValueError, match="25 runs are more than can be told apart in a chart: give at most 24"):
        OverlayReport([(str(i), [], {}) for i in range(25)])


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["a", "b"], 2, "one RUN_DIR alone, or several and out=PAGE.html"),
        (["a", "out=x.html"], 2, "one RUN_DIR alone"),
        (["out=x.html"], 2, "one RUN_DIR alone"),
        (["a", "nowhere", "out=x.html"], 1, "nowhere: no metrics.jsonl; give the run_dir of a run"),
        (["a", "a", "out=no/such/x.html"], 1, "out=no/such/x.html: cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, capsys, arguments, status, message):
    run(tmp_path / "a", 0.5, 0.1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == status and message in capsys.readouterr().err


def test_win_rates_of_a_table_mirror_each_other():
    def rate(value, low, high):
        return {"win_rate": value, "win_rate_ci_low": low, "win_rate_ci_high": high}

    first = {"kind": "eval", "candidate": "A", **{f"eval/{k}": v for k, v in rate(0.6, 0.5, 0.7).items()}}
    second = {"kind": "eval", "candidate": "B", **{f"eval/{k}": v for k, v in rate(0.8, 0.75, 0.9).items()}}
    second["against"] = [{"over": "A", **rate(0.7, 0.65, 0.8)}]
    (table,) = EvaluationReport([first, second], [], {}).tables()
    assert table.columns == ["", "over Start model", "over A", "over B"]
    assert table.rows == [
        ["Start model", "–", "40% (95% CI 30% to 50%)", "20% (95% CI 10% to 25%)"],
        ["A", "60% (95% CI 50% to 70%)", "–", "30% (95% CI 20% to 35%)"],
        ["B", "80% (95% CI 75% to 90%)", "70% (95% CI 65% to 80%)", "–"],
    ]
    assert EvaluationReport([first], [], {}).tables() == []
