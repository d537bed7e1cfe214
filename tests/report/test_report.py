"""The report is one safe, self-contained page, at any moment of a run."""

import re
import subprocess
import sys

import pytest
from pages import Page

from nemo_brain.cli.report import main
from nemo_brain.core.groups import Output, Prompt, RewardedGroup, ScoredGroup
from nemo_brain.report.charts import CURVE_POINTS
from nemo_brain.report.evaluate import evaluate
from nemo_brain.report.kinds.brain import BRAInReport
from nemo_brain.report.metrics import MetricsWriter, read_metrics, write_samples
from nemo_brain.report.page import TEXT_CHARACTERS, write_report

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
CHARTS = 10


def held_out(shift, text="an output"):
    return [
        ScoredGroup(
            Prompt(f"p{i}", f"prompt {i} {HOSTILE}", [1], reference=f"gold {HOSTILE}"),
            [Output([1, 2], f"{text} {i} {HOSTILE}", True)] * 2,
            rewards=[i + shift + 0.1 * i * shift] * 2,
            prior_logprobs=[-3.0] * 2,
            proposal_logprobs=[-2.0] * 2,
            policy_logprobs=[-2.0] * 2,
        )
        for i in range(4)
    ]


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "a <run>"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"objective:\n  name: brain\n  gamma: 0.5\ntrainer: {{max_iterations: 3}}\nrollout: {{outputs_per_prompt: 2}}\n"
        f'note: "{HOSTILE}"\n'
    )
    writer, start = MetricsWriter(run), held_out(0)
    writer.write("eval", 0, evaluate(start, start, [5.0] * 4).as_metrics() | {"iteration": 0})
    write_samples(run, 0, start, "start")
    for step in (1, 2):
        fields = {"iteration": step, "loss": 0.5 / step, "kl_alpha_beta": 0.5 / step, "ess_alpha": 1.5, "ess_beta": 1.9}
        fields |= {"grad_norm": 1.0, "tokens": 100, "step_seconds": 1.0, "tokens_per_second": 100.0}
        writer.write("step", step, fields)
        fields = {"iteration": step, "reward/mean": 0.1, "reward/best_of_n": 0.2, "kl_to_prior": 0.3}
        fields |= {"sample_seconds": 2.0, "score_seconds": 1.0, "train_seconds": 1.0, "outputs/length": 9.0}
        writer.write("iteration", step, fields)
        write_samples(run, step, held_out(step)[:2], "train", alpha=[[0.25, 0.75]] * 2)
        write_samples(run, step, held_out(step, "a better output"), "validation")
        writer.write("eval", step, evaluate(start, held_out(step), [5.0] * 4).as_metrics() | {"iteration": step})
    return run


def report(run):
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_a_whole_run_is_shown(run_dir):
    html = report(run_dir)
    page = Page(html)
    labelled = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(labelled) == CHARTS and all(svg["aria-label"] for svg in labelled)
    assert len(page.ids) == len(set(page.ids))
    assert "Not there yet" not in html and "No data" not in html
    assert "2 of 3 iterations, 2 optimizer steps" in html
    # Prompt i has reward i at the start and 1.2 i + 2 in the end.
    assert "the mean reward rose from 1.50 to 3.80" in html
    assert "4 better" in html and "▲ +2.20" in html
    assert 'style="width: 75.0%"' in html and html.index("75.0%") < html.index("25.0%")
    assert "max_iterations: 3" in html


def test_outputs_cannot_inject_html(run_dir):
    page = Page(report(run_dir))
    assert page.count("img") == 0
    assert page.count("script") == 1  # ours, which sorts the table
    assert "&lt;script&gt;alert(&#39;x&#39;)" in (run_dir / "report.html").read_text()


def test_the_page_loads_nothing(run_dir):
    html = report(run_dir)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    for tag, attributes in Page(html).elements:
        assert tag not in ("link", "iframe", "object", "embed")
        assert "src" not in attributes
        assert all(value.startswith("#") for name, value in attributes.items() if name.endswith("href"))
    # Charts refer to their own definitions only, and to all of them.
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', html)) <= set(re.findall(r' id="([\w-]+)"', html))


def test_charts_follow_the_theme(run_dir):
    html = report(run_dir)
    svgs = "".join(re.findall(r'<svg role="img".*?</svg>', html, flags=re.S))
    assert "var(--c1)" in svgs and "var(--ink-soft)" in svgs
    assert not re.search(r"(?:stroke|fill): #[0-9a-f]{6}", svgs)


def test_an_empty_directory_says_what_is_missing(tmp_path):
    html = report(tmp_path)
    Page(html)
    for name in ("config.yaml", "step records", "samples.jsonl"):
        assert f"<li>{name}" in html
    assert "Nothing has been recorded yet" in html


def test_a_run_whose_records_hold_nothing_says_what_is_missing(tmp_path):
    MetricsWriter(tmp_path).write("step", 1, {"iteration": None})
    html = report(tmp_path)
    Page(html)
    for name in ("iteration records", "eval records"):
        assert f"<li>{name}" in html
    assert html.count("No data:") == CHARTS
    assert "not been evaluated" in html


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.jsonl"])
def test_each_file_may_be_missing(run_dir, name):
    (run_dir / name).unlink()
    html = report(run_dir)
    Page(html)
    assert "Not there yet" in html


def test_every_moment_of_a_run_can_be_reported(run_dir):
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    samples = (run_dir / "samples.jsonl").read_bytes()
    for part in (0.05, 0.35, 0.5, 0.9):
        (run_dir / "metrics.jsonl").write_bytes(metrics[: int(part * len(metrics))])
        (run_dir / "samples.jsonl").write_bytes(samples[: int(part * len(samples))])
        Page(report(run_dir))
    (run_dir / "metrics.jsonl").write_bytes(metrics)
    (run_dir / "samples.jsonl").write_bytes(samples)
    assert "rose from 1.50 to 3.80" in report(run_dir)


def test_a_run_that_has_only_been_evaluated_at_the_start(run_dir):
    first = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (run_dir / "metrics.jsonl").write_text(first)
    (run_dir / "samples.jsonl").unlink()
    html = report(run_dir)
    assert "the start model&#39;s mean reward is 1.50" in html
    assert "Nothing to compare" in html and "no iteration has finished yet" in html


def test_nulls_in_every_metric_do_not_stop_it(run_dir):
    records = read_metrics(run_dir / "metrics.jsonl")
    keep = ("kind", "step", "iteration")
    (run_dir / "metrics.jsonl").unlink()
    for record in records:
        nulls = {k: v if k in keep else float("nan") for k, v in record.items() if k not in ("kind", "step")}
        MetricsWriter(run_dir).write(record["kind"], record["step"], nulls)
    Page(report(run_dir))


def test_long_outputs_and_curves_stay_small(run_dir):
    writer = MetricsWriter(run_dir)
    for step in range(3, 3003):
        writer.write("step", step, {"iteration": 2, "grad_norm": 1.0 + step % 2})
    long = RewardedGroup(Prompt("p0", "x" * 300_000, [1]), [Output([1], "y" * 300_000, True)], rewards=[1.0])
    write_samples(run_dir, 3, [long], "train")
    html = report(run_dir)
    assert "y" * TEXT_CHARACTERS in html and "y" * (TEXT_CHARACTERS + 1) not in html
    assert "(295,000 more)" in html
    assert len(html) < 1_000_000
    records = read_metrics(run_dir / "metrics.jsonl")
    curve = next(p for p in BRAInReport(records, [], {}).panels() if p.title == "Gradient norm").series[0]
    assert len(curve.x) <= CURVE_POINTS
    # Pairs of neighbours average out: 1, 2, 1, 2, ... becomes about 1.5 everywhere.
    assert all(abs(y - 1.5) < 0.13 for y in curve.y[1:])


def test_verdict_claims_a_change_only_where_the_interval_excludes_zero():
    record = {"kind": "eval", "iteration": 3, "eval/prompts": 9, "eval/start_reward": 1.0, "eval/reward": 1.2}
    name = "eval/reward_difference"
    for low, high, words in [
        (-0.1, 0.5, "no clear change"),
        (0.1, 0.3, "rose"),
        (-0.3, -0.1, "fell"),
        (None,) * 2 + ("no clear",),
    ]:
        changed = record | {name: 0.2, f"{name}_ci_low": low, f"{name}_ci_high": high}
        assert words in BRAInReport([changed], [], {}).verdict()


def test_the_final_outputs_are_compared_with_the_start_by_id():
    def sample(kind, iteration, name, *rewards):
        return {
            "kind": kind,
            "iteration": iteration,
            "id": name,
            "outputs": [{"text": "t", "reward": r} for r in rewards],
        }

    def compare(samples):
        return BRAInReport([], samples, {}).comparison()

    samples = [sample("start", 0, "a", 1.0, 2.0), sample("start", 0, "b", 0.0), sample("validation", 1, "a", 9.0)]
    assert compare(samples).columns[2][0] == "Iteration 1"
    samples += [sample("final", 2, "b", 0.0), sample("final", 2, "a", 1.0), sample("final", 2, "new", 1.0)]
    comparison = compare(samples)
    assert [(row.cells[2].note.text, row.key) for row in comparison.rows] == [
        ("reward 0.00", 0.0),
        ("reward 1.00", -0.5),
    ]
    assert [count.text for count in comparison.counts] == ["0 better", "1 the same", "1 worse"]
    assert compare(samples[:2]) is None


def test_training_groups_are_the_latest_and_the_first():
    samples = [
        {
            "kind": "train",
            "iteration": i,
            "id": "a",
            "outputs": [{"text": "l", "weight": 0.2}, {"text": "h", "weight": 0.8}],
        }
        for i in (1, 2, 3)
    ]
    found = BRAInReport([], samples, {}).training_groups()
    assert [iteration for iteration, _ in found] == [3, 1]
    assert [output["text"] for output in found[0][1][0]["outputs"]] == ["h", "l"]
    assert len(BRAInReport([], samples[:1], {}).training_groups()) == 1


def test_the_command_writes_the_report(run_dir):
    done = subprocess.run([sys.executable, "-m", "nemo_brain", "report", str(run_dir)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(run_dir / "report.html")


def test_the_command_says_why_it_cannot(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nowhere")])
    assert stopped.value.code == 1
    assert "no such run directory" in capsys.readouterr().err
