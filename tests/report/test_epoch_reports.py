"""Fine-tuning and reward trainings are reported like BRAIn runs: a page at any moment, and lines of text at the end."""

import math

import numpy as np
import pytest
from pages import Page

from nemo_brain.core.groups import Group, Output, Prompt, RewardedGroup
from nemo_brain.report.kinds.choice import make_report
from nemo_brain.report.kinds.reward_model import RewardModelReport
from nemo_brain.report.kinds.sft import SFTReport
from nemo_brain.report.metrics import MetricsWriter, read_metrics, read_samples, write_samples
from nemo_brain.report.page import write_report
from nemo_brain.report.preferences import preference_metrics
from nemo_brain.report.summary import summary_lines

HOSTILE = "<script>alert('x')</script>"
CHARTS = {"sft": 4, "reward_model": 8}
CONFIG = {"trainer": {"epochs": 2}, "model": {"export_to": "runs/a/model"}}
COMMON = {"grad_norm": 1.0, "lr": 1e-5, "tokens": 100, "step_seconds": 0.5, "tokens_per_second": 200.0}


def sft_eval(loss, start_loss):
    sizes = {"eval/completions": 4, "eval/completion_tokens": 123}
    return {"eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/start_loss": start_loss, **sizes}


def sft_samples(text):
    return [
        Group(Prompt(f"p{i}", f"say {i} {HOSTILE}", [1], reference=f"demonstration {i}"), [Output([1], text, True)])
        for i in range(2)
    ]


def write_sft(run, held_out=True):
    writer = MetricsWriter(run)
    if held_out:
        writer.write("eval", 0, {"epoch": None, **sft_eval(3.0, 3.0)})
        write_samples(run, 0, sft_samples(f"before {HOSTILE}"), "start")
    for epoch in range(2):
        for step in (2 * epoch + 1, 2 * epoch + 2):
            writer.write("step", step, {"epoch": epoch, "loss": 3.0 / step, "completion_tokens": 60, **COMMON})
        if held_out:
            writer.write("eval", 2 * epoch + 2, {"epoch": epoch, **sft_eval(2.5 - 0.5 * epoch, 3.0)})
            write_samples(run, epoch + 1, sft_samples(f"demonstration {epoch}"), ("validation", "final")[epoch])


def rewards(right, of=40, gap=2.0):
    """Of ``of`` pairs so many have a chosen output that is better by ``gap``, in the others it is worse by it."""
    return np.array([[gap, 0.0] if i < right else [0.0, gap] for i in range(of)])


def reward_samples(right):
    return [
        RewardedGroup(
            Prompt(f"p{i}", f"say {i} {HOSTILE}", [1]),
            [Output([1], text, True) for text in ("the chosen", "the rejected")],
            rewards=pair.tolist(),
        )
        for i, pair in enumerate(rewards(right, of=4))
    ]


def write_reward_model(run, held_out=True):
    writer = MetricsWriter(run)
    if held_out:
        writer.write("eval", 0, {"epoch": None, **preference_metrics(rewards(20))})
        write_samples(run, 0, reward_samples(1), "start")
    for epoch in range(2):
        for step in (2 * epoch + 1, 2 * epoch + 2):
            fields = {"epoch": epoch, "loss": 0.7 / step, "accuracy": 0.5, "reward_gap": 0.1 * step, **COMMON}
            writer.write("step", step, fields)
        if held_out:
            writer.write("eval", 2 * epoch + 2, {"epoch": epoch, **preference_metrics(rewards(30 + 6 * epoch))})
            write_samples(run, epoch + 1, reward_samples(2 + epoch), ("validation", "final")[epoch])


WRITE = {"sft": write_sft, "reward_model": write_reward_model}


@pytest.fixture(params=WRITE)
def kind(request):
    return request.param


@pytest.fixture
def run_dir(tmp_path, kind):
    (tmp_path / "config.yaml").write_text("trainer: {epochs: 2}\nmodel: {export_to: runs/a/model}\n")
    WRITE[kind](tmp_path)
    return tmp_path


def page(run):
    html = write_report(run).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_whole_run_is_shown(run_dir, kind):
    html, parsed = page(run_dir)
    labelled = [attributes for tag, attributes in parsed.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(labelled) == CHARTS[kind] and all(svg["aria-label"] for svg in labelled)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "Not there yet" not in html and "No data" not in html and "n/a" not in html
    assert "epoch 2 of 2, 4 optimizer steps" in html
    assert HOSTILE not in html and "say 0 &lt;script&gt;" in html
    assert "iteration" not in html.lower()


def test_every_moment_of_a_run_can_be_reported(run_dir):
    files = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    for part in (0.0, 0.05, 0.35, 0.5, 0.9):
        for name, content in files.items():
            (run_dir / name).write_bytes(content[: int(part * len(content))])
        page(run_dir)


def test_nulls_in_every_metric_do_not_stop_it(run_dir, kind):
    records = read_metrics(run_dir / "metrics.jsonl")
    nulls = [{k: v if k in ("kind", "step", "epoch") else None for k, v in record.items()} for record in records]
    (run_dir / "metrics.jsonl").unlink()
    writer = MetricsWriter(run_dir)
    for record in nulls:
        writer.write(record["kind"], record["step"], {k: v for k, v in record.items() if k not in ("kind", "step")})
    html, _ = page(run_dir)
    assert html.count("No data:") == CHARTS[kind]
    assert "n/a" in "\n".join(summary_lines(nulls, CONFIG, "report.html"))


def test_a_run_without_held_out_examples(tmp_path, kind):
    WRITE[kind](tmp_path, held_out=False)
    html, _ = page(tmp_path)
    words = {"sft": ("completions", "3.000 to 0.750"), "reward_model": ("pairs", "0.700 to 0.175")}[kind]
    assert "No held-out {} have been evaluated. The training loss went from {}.".format(*words) in html
    assert "eval records" in html and "Nothing to compare" in html
    assert summary_lines(read_metrics(tmp_path / "metrics.jsonl"), CONFIG, "runs/a/report.html") == [
        "held-out  not evaluated",
        "training  4 steps in 2.0 s, 200 tokens/s",
        "model     runs/a/model",
        "report    runs/a/report.html",
    ]


@pytest.mark.parametrize(
    ("record", "title"),
    [
        ({"kind": "step", "iteration": 0, "ess_alpha": 1.0, "loss": 1.0}, "BRAIn run"),
        ({"kind": "eval", "iteration": 0, "eval/reward": 1.0}, "BRAIn run"),
        ({"kind": "step", "epoch": 0, "loss": 1.0, "completion_tokens": 3}, "Supervised fine-tuning"),
        ({"kind": "eval", "epoch": None, **sft_eval(1.0, 1.0)}, "Supervised fine-tuning"),
        ({"kind": "step", "epoch": 0, "loss": 1.0, "reward_gap": None}, "Reward model"),
        ({"kind": "eval", "epoch": None, **preference_metrics(rewards(3))}, "Reward model"),
    ],
)
def test_any_record_tells_what_was_trained(record, title):
    assert make_report([{"step": 0, **record}], [], {}).title == title


def test_fine_tuning_is_summed_up(tmp_path):
    write_sft(tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert SFTReport(records, [], {}).verdict() == (
        "On 123 tokens of 4 held-out completions, the loss fell from 3.000 to 2.000 nats per token, "
        "perplexity 20.1 to 7.39."
    )
    assert SFTReport(records[:1], [], {}).verdict() == (
        "On 123 tokens of 4 held-out completions, the start model's loss is 3.000 nats per token, perplexity 20.1."
    )
    assert summary_lines(records, CONFIG, "runs/a/report.html") == [
        "held-out loss  3.000 -> 2.000 nats per token, on 123 tokens of 4 completions",
        "perplexity     20.1 -> 7.39",
        "training       4 steps in 2.0 s, 200 tokens/s",
        "model          runs/a/model",
        "report         runs/a/report.html",
    ]


def test_a_held_out_loss_that_was_lower_before_is_said():
    records = [{"kind": "eval", "step": 0, "epoch": None, **sft_eval(3.0, 3.0)}]
    for epoch, loss in enumerate((1.5, 1.25, 1.75)):
        records.append({"kind": "eval", "step": epoch + 1, "epoch": epoch, **sft_eval(loss, 3.0)})
    assert "fell from 3.000 to 1.750" in SFTReport(records, [], {}).verdict()
    assert "It was lower after epoch 2: 1.250." in SFTReport(records, [], {}).verdict()
    assert "It was lower" not in SFTReport(records[:3], [], {}).verdict()


def test_training_and_held_out_loss_share_a_chart_over_optimizer_steps(tmp_path):
    write_sft(tmp_path)
    training, held_out, start = SFTReport(read_metrics(tmp_path / "metrics.jsonl"), [], {}).panels()[0].series
    assert (training.x, training.y) == ([1, 2, 3, 4], [3.0, 1.5, 1.0, 0.75])
    assert (held_out.x, held_out.y) == ([0, 2, 4], [3.0, 2.5, 2.0])
    assert start.y == [3.0]


def test_outputs_stand_beside_their_demonstration(tmp_path):
    write_sft(tmp_path)
    comparison = SFTReport([], read_samples(tmp_path / "samples.jsonl"), {}).comparison()
    assert [name for name, _ in comparison.columns] == ["Prompt", "Demonstration", "Start model", "After epoch 2"]
    assert [[cell.text for cell in row.cells[1:]] for row in comparison.rows] == [
        [f"demonstration {i}", f"before {HOSTILE}", "demonstration 1"] for i in range(2)
    ]
    assert [row.cells[3].note is not None for row in comparison.rows] == [False, True]


def test_a_reward_model_is_summed_up(tmp_path):
    write_reward_model(tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    # 20, then 36 of 40 right: Wilson's intervals by scipy's binomtest.
    assert RewardModelReport(records, [], {}).verdict() == (
        "On 40 held-out pairs, the accuracy rose from 50.0% (95% CI 35.2% to 64.8%) to 90.0% (95% CI 76.9% to 96.0%)."
    )
    assert RewardModelReport(records[:1], [], {}).verdict() == (
        "On 40 held-out pairs, the start model prefers the chosen output in 50.0% (95% CI 35.2% to 64.8%)."
    )
    # A run that went on from another run's checkpoint has no evaluation of the start model.
    assert "the model prefers the chosen output in 90.0%" in RewardModelReport(records[1:], [], {}).verdict()
    # log(1 + e^2) and log(1 + e^-2), 4 and 36 times; confidence sigmoid(2).
    assert summary_lines(records, CONFIG, "runs/a/report.html") == [
        "accuracy     50.0% -> 90.0% (95% CI 76.9% to 96.0%) on 40 pairs",
        "log-loss     0.327 nats (0.693 by guessing)",
        "reward       1.00, standard deviation 1.00",
        "calibration  mean error 1.9%; confidence, accuracy, pairs:",
        "             88%  90%  40",
        "training     4 steps in 2.0 s, 200 tokens/s",
        "model        runs/a/model",
        "report       runs/a/report.html",
    ]


@pytest.mark.parametrize(("right", "words"), [(36, "rose"), (4, "fell"), (26, "no clear change"), (20, "no clear")])
def test_the_verdict_claims_a_change_only_where_the_intervals_are_apart(right, words):
    records = [
        {"kind": "eval", "step": i, "epoch": epoch, **preference_metrics(rewards(count))}
        for i, (epoch, count) in enumerate([(None, 20), (0, right)])
    ]
    assert words in RewardModelReport(records, [], {}).verdict()


def test_the_calibration_is_drawn_with_the_sizes_of_its_bins(tmp_path):
    write_reward_model(tmp_path)
    report = RewardModelReport(read_metrics(tmp_path / "metrics.jsonl"), [], {})
    panel = next(panel for panel in report.panels() if panel.title == "Calibration")
    start, latest, diagonal = panel.series
    assert start.y == [0.5] and latest.y == [0.9] and latest.x == [pytest.approx(1 / (1 + math.exp(-2)))]
    assert diagonal.style == "--"
    assert "88% sure: 90% of 40 right" in panel.svg and ">40<" in panel.svg


def test_wrong_orders_are_marked_before_and_after(tmp_path):
    write_reward_model(tmp_path)
    comparison = RewardModelReport([], read_samples(tmp_path / "samples.jsonl"), {}).comparison()
    assert [count.text for count in comparison.counts] == ["3 right (before: 1)", "1 wrong (before: 3)"]
    marks = [[(cell.note.text, cell.note.tone) for cell in row.cells[3:]] for row in comparison.rows]
    right, wrong = ("✓ +2.00", "good"), ("✗ -2.00", "bad")
    assert marks == [[right, right], [wrong, right], [wrong, right], [wrong, wrong]]
    assert [cell.note.text for cell in comparison.rows[1].cells[1:3]] == ["reward 0.00 → 2.00", "reward 2.00 → 0.00"]
    assert [row.key for row in comparison.rows] == [2.0, 2.0, 2.0, -2.0]
