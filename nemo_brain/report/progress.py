"""What a run shows while it works and when it ends: a progress bar, or log lines without a terminal; a text summary."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemo_brain.report.metrics import summarize

LOG_SECONDS = 10.0


def progress(total: int | None, description: str, unit: str) -> tqdm | LogProgress:
    """A context manager whose ``update(n)`` reports n more of ``total`` units, with rate and time left.

    On rank 0 a bar on a terminal, or else at most a line every 10 seconds (work that is shorter stays silent); other
    ranks show nothing. Output goes to stderr.
    """
    if _rank() == 0 and not sys.stderr.isatty():
        return LogProgress(total, description, unit)
    return tqdm(total=total, desc=description, unit=f" {unit}", leave=False, dynamic_ncols=True, disable=_rank() != 0)


class LogProgress:
    """Progress as plain lines, for logs: no carriage returns, no control characters."""

    def __init__(self, total: int | None, description: str, unit: str):
        self._total, self._description, self._unit = total, description, unit
        self._done = 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if time.monotonic() - self._started >= LOG_SECONDS:
            self._print()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._printed >= LOG_SECONDS and self._done != self._total:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        rate = self._done / max(elapsed, 1e-9)
        line = f"{self._description}: {self._done}"
        if self._total:
            line += f"/{self._total} ({self._done / self._total:.0%})"
        line += f" {self._unit}, {rate:.3g} {self._unit}/s, {duration(elapsed)} so far"
        if self._total and 0 < self._done < self._total:
            line += f", {duration((self._total - self._done) / rate)} left"
        print(line, file=sys.stderr, flush=True)


def summary_lines(records: Sequence[Mapping[str, Any]], report: str | Path | None = None) -> list[str]:
    """The end of a run in lines of text: what changed on held-out prompts, what it cost, where the report is.

    Args:
        records: the run's metrics, see ``metrics.read_metrics``.
        report: the report's path, if one was written.
    """
    run = summarize(records)
    rows: list[tuple[str, str]] = []
    if (last := run.last) is None:
        rows.append(("held-out", "not evaluated (no eval record in metrics.jsonl)"))
    else:

        def with_interval(name: str, text: Callable[[float | None], str] = number) -> str:
            ci = interval(last, name, text)
            return text(last.get(name)) + (ci and f" ({ci})")

        p = p_text(last.get("eval/p_value"))
        before, prompts = number(last.get("eval/start_reward")), number(last.get("eval/prompts"))
        rows += [
            ("held-out reward", f"{before} -> {with_interval('eval/reward')} on {prompts} prompts"),
            ("change", with_interval("eval/reward_difference", signed) + (p and f", {p} (paired t-test)")),
            ("win-rate over start", with_interval("eval/win_rate", percent)),
            ("KL to prior", f"{with_interval('eval/kl_to_prior')} nats"),
        ]
        if last.get("eval/reference_reward") is not None:
            rows.append(("reference answers", f"{number(last['eval/reference_reward'])} mean reward"))
    rows.append(
        (
            "time",
            f"sampling {duration(run.sample_seconds)}, scoring {duration(run.score_seconds)}, "
            f"training {duration(run.train_seconds)} ({run.iterations} iterations, {run.steps} steps)",
        )
    )
    if run.train_tokens_per_second is not None:
        rows.append(("training speed", f"{run.train_tokens_per_second:,.0f} tokens/s"))
    if report is not None:
        rows.append(("report", str(report)))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def number(value: float | None, plus: str = "") -> str:
    """A metric for people: two decimals, fewer for large ones, more for small ones; "n/a" if it is missing."""
    if value is None:
        return "n/a"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:{plus},.0f}"
    if abs(value) >= 10:
        return f"{value:{plus}.1f}"
    return f"{value:{plus}.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:{plus}.2g}"


def signed(value: float | None) -> str:
    """A difference for people: ``number`` with its sign."""
    return number(value, "+")


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0%}"


def p_text(value: float | None) -> str:
    """A p-value for people, "" if there is none: below 0.001 its order says nothing more."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def interval(record: Mapping[str, Any], name: str, text: Callable[[float], str] = number) -> str:
    """The 95% confidence interval of a metric of an eval record, for people; "" if it has none."""
    low, high = record.get(f"{name}_ci_low"), record.get(f"{name}_ci_high")
    return "" if low is None or high is None else f"95% CI {text(low)} to {text(high)}"


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))
