"""The report of a run: one self-contained report.html from config.yaml, metrics.jsonl and samples.jsonl.

    python -m nemo_brain.report RUN_DIR

It can be written at any time, while the run goes on too, and says what is missing where files are. Charts are inline
SVG whose colours are CSS variables, so they follow the reader's light or dark theme; nothing is loaded from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nemo_brain.report.charts import Panel, Records, Series, frontier, line_chart, mean, needs, thinned, time_split
from nemo_brain.report.metrics import read_metrics, read_samples, summarize
from nemo_brain.report.progress import duration, interval, number, p_text, percent, signed

TABLE_PROMPTS = 100
TRAIN_GROUPS = 8
TEXT_CHARACTERS = 5000


def write_report(run_dir: str | Path) -> Path:
    """Writes ``run_dir``/report.html from whatever of the run's files exists, and returns its path.

    Raises:
        ValueError: if there is no such directory, or a file of it is broken (with file and line).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run directory; give the run_dir of a run")
    records, samples = read_metrics(run_dir / "metrics.jsonl"), read_samples(run_dir / "samples.jsonl")
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else None
    config = _config(config_text)
    files = [path for name in ("metrics.jsonl", "samples.jsonl") if (path := run_dir / name).exists()]
    as_of = max((path.stat().st_mtime for path in files), default=None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration, "clip": _clip}
    html = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        config=config,
        config_text=config_text,
        run=summarize(records),
        verdict=verdict(records),
        tiles=tiles(records, config),
        panels=panels(records, config),
        comparison=compare(samples),
        training=training_groups(samples),
        missing=_missing(records, samples, config_text),
        as_of=datetime.fromtimestamp(as_of).astimezone().strftime("%Y-%m-%d %H:%M %Z") if as_of else None,
        limit=TABLE_PROMPTS,
    )
    path = run_dir / "report.html"
    # Replaced whole, so that a page reloaded during the run is never half a page.
    draft = run_dir / "report.html.tmp"
    draft.write_text(html, encoding="utf-8", errors="replace")
    os.replace(draft, path)
    return path


def verdict(records: Records) -> str:
    """What happened on the held-out prompts, in one sentence."""
    run = summarize(records)
    if run.last is None:
        return "The run has not been evaluated on held-out prompts yet."
    before, after = number(run.last.get("eval/start_reward")), number(run.last.get("eval/reward"))
    prompts = number(run.last.get("eval/prompts"))
    if run.last.get("iteration") == 0:
        return f"On {prompts} held-out prompts, the start model's mean reward is {after}."
    low, high = (run.last.get(f"eval/reward_difference_ci_{side}") for side in ("low", "high"))
    if low is None or high is None or low <= 0 <= high:
        change = f"shows no clear change: {before} at the start, {after} now"
    else:
        change = f"{'rose' if low > 0 else 'fell'} from {before} to {after}"
    evidence = "" if low is None or high is None else f" (change {_change(run.last)})"
    return f"On {prompts} held-out prompts, the mean reward {change}{evidence}."


def tiles(records: Records, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline numbers: (name, value, explanation), those that are known."""
    run, found = summarize(records), []
    last = run.last or {}
    if last.get("eval/reward") is not None:
        difference = last.get("eval/reward_difference")
        p = p_text(last.get("eval/p_value"))
        found.append(
            (
                "Held-out reward",
                number(last["eval/reward"]),
                f"from {number(last.get('eval/start_reward'))}, {signed(difference)}" + (p and f", {p}"),
            )
        )
    if last.get("eval/win_rate") is not None:
        found.append(("Win-rate over start", percent(last["eval/win_rate"]), interval(last, "eval/win_rate", percent)))
    if last.get("eval/kl_to_prior") is not None:
        found.append(("KL to prior", f"{number(last['eval/kl_to_prior'])} nats", interval(last, "eval/kl_to_prior")))
    if last.get("eval/reference_reward") is not None:
        found.append(("Reference reward", number(last["eval/reference_reward"]), "mean over the reference answers"))
    steps = [r for r in records if r.get("kind") == "step" and r.get("ess_alpha") is not None]
    if steps:
        n = _outputs_per_prompt(config)
        of = f" of {n}" if n else ""
        found.append(("Effective samples", f"{number(steps[-1]['ess_alpha'])}{of}", "outputs per prompt, by weights α"))
    spent = run.sample_seconds + run.score_seconds + run.train_seconds
    if spent:
        shares = ", ".join(
            f"{name} {percent(seconds / spent)}"
            for name, seconds in (
                ("sampling", run.sample_seconds),
                ("scoring", run.score_seconds),
                ("training", run.train_seconds),
            )
        )
        found.append(("Time", duration(spent), shares))
    if run.train_tokens_per_second:
        memory = (
            f", peak memory {number(run.peak_memory_gib)} GiB" if run.peak_memory_gib else " over all optimizer steps"
        )
        found.append(("Training speed", f"{run.train_tokens_per_second:,.0f}", f"tokens/s{memory}"))
    return found


def panels(records: Records, config: Mapping[str, Any]) -> list[Panel]:
    """Every chart of the report, in reading order."""
    x_of = {"step": "step", "iteration": "iteration", "eval": "iteration"}
    source = {k: [r for r in records if r.get("kind") == k and r.get(x) is not None] for k, x in x_of.items()}
    last = source["eval"][-1] if source["eval"] else {}
    n = _outputs_per_prompt(config)

    def curve(kind: str, name: str, label: str, colour: str = "c1") -> Series:
        x = [r[x_of[kind]] for r in source[kind]]
        return Series(label, *thinned(x, [r.get(name) for r in source[kind]]), colour)

    def held_out(name: str, label: str = "held-out, 95% CI") -> Series:
        keys = ("iteration", name, f"{name}_ci_low", f"{name}_ci_high")
        x, y, low, high = ([r.get(key) for r in source["eval"]] for key in keys)
        return Series(label, x, y, "c1", "o-", low, high)

    def panel(kind: str, title: str, caption: str, *series: Series, **options: bool) -> Panel:
        known = [s for s in series if s.known()]
        svg = line_chart(title, "optimizer step" if kind == "step" else "iteration", known, **options)
        return Panel(title, caption, needs(kind), known, svg if any(s.x for s in known) else None)

    def level(value: float | None, label: str, style: str) -> Series:
        return Series(label, [], [value], "ink-soft", style)

    loss = [curve("step", "loss", "loss", "c2"), curve("step", "kl_alpha_beta", "KL(α‖β)")]
    if loss[0].y == loss[1].y:  # BRAIn's loss is this divergence; other objectives' losses are not
        loss = [Series("loss = KL(α‖β)", loss[1].x, loss[1].y, "c1")]
    return [
        panel(
            "iteration",
            "Reward",
            "Held-out prompts against the start model's level, and the outputs trained on.",
            held_out("eval/reward"),
            curve("iteration", "reward/mean", "training mean", "c2"),
            curve("iteration", "reward/best_of_n", f"training best of {n or 'n'}", "c3"),
            level(last.get("eval/start_reward"), "start model", ":"),
            level(last.get("eval/reference_reward"), "reference answers", "--"),
        ),
        panel(
            "iteration",
            "KL to the prior",
            "Nats per output: how far the policy has moved.",
            held_out("eval/kl_to_prior"),
            curve("iteration", "kl_to_prior", "training", "c2"),
        ),
        frontier(source["eval"]),
        panel(
            "eval",
            "Win-rate over the start model",
            "Share of output pairs with the higher reward, ties as half.",
            held_out("eval/win_rate", "win-rate, 95% CI"),
            level(0.5, "no difference", ":"),
            percents=True,
        ),
        panel(
            "step",
            "Effective sample size",
            "Outputs per prompt that carry weight; near 1, one output decides everything.",
            curve("step", "ess_alpha", "target weights α"),
            curve("step", "ess_beta", "policy weights β", "c2"),
            level(n, f"n = {n}", "--"),
            zero=True,
        ),
        panel("step", "Loss", "Divergence of the policy's weights from the target's.", *loss),
        panel("step", "Gradient norm", "Before clipping.", curve("step", "grad_norm", "gradient norm"), zero=True),
        panel(
            "iteration",
            "Output length",
            "A drift here often explains a drift in reward.",
            curve("iteration", "outputs/length", "mean tokens of a training output"),
            zero=True,
        ),
        panel(
            "step",
            "Training speed",
            "Over the optimizer steps, sampling and scoring apart.",
            curve("step", "tokens_per_second", "tokens per second"),
            zero=True,
        ),
        time_split(source["iteration"]),
    ]


def compare(samples: Records) -> dict[str, Any] | None:
    """Held-out prompts with the start model's outputs and the latest ones; None without both."""
    before = {s["id"]: s for s in samples if s.get("kind") == "start"}
    later = [s for s in samples if s.get("kind") == "final"] or [s for s in samples if s.get("kind") == "validation"]
    latest = max((s["iteration"] for s in later), default=None)
    rows = []
    for sample in later:
        if sample["iteration"] != latest or sample["id"] not in before:
            continue
        start = before[sample["id"]]
        means = [_mean_reward(start), _mean_reward(sample)]
        difference = None if None in means else means[1] - means[0]
        rows.append({"before": start, "after": sample, "means": means, "difference": difference})
    if not rows:
        return None
    known = [row["difference"] for row in rows if row["difference"] is not None]
    return {
        "rows": rows[:TABLE_PROMPTS],
        "total": len(rows),
        "iteration": latest,
        "better": sum(d > 0 for d in known),
        "same": sum(d == 0 for d in known),
        "worse": sum(d < 0 for d in known),
    }


def training_groups(samples: Records) -> list[tuple[int, list[dict[str, Any]]]]:
    """Groups of the latest and of the first iteration trained on, outputs by falling weight: (iteration, groups)."""
    train = [s for s in samples if s.get("kind") == "train"]
    iterations = sorted({s["iteration"] for s in train})
    chosen = [iterations[-1], iterations[0]] if len(iterations) > 1 else iterations
    found = []
    for iteration in chosen:
        groups = [s for s in train if s["iteration"] == iteration][:TRAIN_GROUPS]
        found.append(
            (
                iteration,
                [g | {"outputs": sorted(g["outputs"], key=lambda o: -(o.get("weight") or 0.0))} for g in groups],
            )
        )
    return found


def _change(record: Mapping[str, Any]) -> str:
    name, p = "eval/reward_difference", p_text(record.get("eval/p_value"))
    return f"{signed(record.get(name))}, {interval(record, name, signed)}" + (p and f", paired t-test {p}")


def _mean_reward(sample: Mapping[str, Any]) -> float | None:
    return mean([output.get("reward") for output in sample["outputs"]])


def _clip(text: str | None) -> str:
    text = text or ""
    return (
        text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … ({len(text) - TEXT_CHARACTERS:,} more)"
    )


def _config(text: str | None) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text or "")
    except yaml.YAMLError:  # shown as it stands; only the names taken from it are missing
        config = None
    return config if isinstance(config, dict) else {}


def _outputs_per_prompt(config: Mapping[str, Any]) -> int | None:
    rollout = config.get("rollout")
    n = rollout.get("outputs_per_prompt") if isinstance(rollout, dict) else None
    return n if isinstance(n, int) else None


def _missing(records: Records, samples: Records, config_text: str | None) -> list[str]:
    """What the report cannot show, and why."""
    kinds = {r.get("kind") for r in records}
    checks = [
        (config_text is None, "config.yaml: the configuration is not shown"),
        ("iteration" not in kinds, "iteration records in metrics.jsonl: no iteration has finished yet"),
        ("eval" not in kinds, "eval records in metrics.jsonl: no evaluation on held-out prompts has finished yet"),
        (not samples, "samples.jsonl: outputs are not shown"),
    ]
    return [text for absent, text in checks if absent]
