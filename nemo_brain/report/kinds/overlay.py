"""The report of several runs side by side: their curves in the same charts, what they were told otherwise, how they
ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_brain.report.charts import CURVES, Panel, Records, Series, frontier
from nemo_brain.report.kinds.base import Report, Table
from nemo_brain.report.kinds.brain import BRAInReport
from nemo_brain.report.text import duration, number, p_text, percent, signed, with_interval

_STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class _Run:
    name: str
    report: BRAInReport
    colour: str
    style: str

    def curve(self, kind: str, metric: str) -> Series:
        if kind == "eval":
            held_out = self.report.held_out(metric, self.name, self.colour)
            return replace(held_out, style=f"o{self.style}")
        return replace(self.report.curve(kind, metric, self.name, self.colour), style=self.style)


class OverlayReport(Report):
    """Of BRAIn runs, in the order in which they were named; what other kinds record under the same names is shown too.

    Args:
        runs: their names, records and configurations.

    Raises:
        ValueError: there are more than curves that can be told apart.
    """

    title = "Comparison"
    explanation = BRAInReport.explanation
    one_run = False

    def __init__(self, runs: Sequence[tuple[str, Records, Mapping[str, Any]]]):
        super().__init__([], [], {})
        looks = [(colour, style) for style in _STYLES for colour in CURVES]
        if len(runs) > len(looks):
            raise ValueError(f"{len(runs)} runs are more than can be told apart in a chart: give at most {len(looks)}")
        self._runs = [
            _Run(name, BRAInReport(records, [], config), colour, style)
            for (name, records, config), (colour, style) in zip(runs, looks, strict=False)
        ]

    def progress(self) -> str:
        return f"{len(self._runs)} runs"

    def verdict(self) -> str:
        rated = [run for run in self._runs if run.report.last.get("eval/reward") is not None]
        if not rated:
            return "No run has been evaluated on held-out prompts yet."
        best = max(rated, key=lambda run: run.report.last["eval/reward"])
        return f"{best.name} ends with the highest held-out reward, {with_interval(best.report.last, 'eval/reward')}."

    def missing(self) -> list[str]:
        return [f"{run.name}: {text}" for run in self._runs for text in run.report.missing() if "samples" not in text]

    def panels(self) -> list[Panel]:
        panel = self._panel
        return [
            panel("eval", "eval/reward", "Held-out reward", "Mean over prompts after an iteration, 95% CI."),
            panel("iteration", "reward/mean", "Training reward", "Mean over the outputs that an iteration sampled."),
            panel("eval", "eval/kl_to_prior", "KL to the prior", "Nats per held-out output, 95% CI."),
            panel("iteration", "kl_to_prior", "KL to the prior, training", "Nats per output that was sampled."),
            frontier([(run.curve("eval", "eval/reward"), run.report.of_kind("eval")) for run in self._runs]),
            panel("step", "ess_alpha", "Effective sample size", "Outputs per prompt that the target rests on.", True),
            panel("step", "loss", "Loss", "Of each run's own objective: losses of different ones do not compare."),
        ]

    def tables(self) -> list[Table]:
        return [self._ends(), self._settings()]

    def _panel(self, kind: str, metric: str, title: str, caption: str, zero: bool = False) -> Panel:
        return BRAInReport([], [], {}).panel(
            kind, title, caption, *(run.curve(kind, metric) for run in self._runs), zero=zero
        )

    def _ends(self) -> Table:
        rows = []
        for run in self._runs:
            last, done = run.report.last, run.report.run
            p = p_text(last.get("eval/p_value"))
            seconds = done.sample_seconds + done.score_seconds + done.train_seconds
            rows.append(
                [
                    run.name,
                    number(last.get("iteration")),
                    with_interval(last, "eval/reward"),
                    with_interval(last, "eval/reward_difference", signed) + (p and f", {p}"),
                    with_interval(last, "eval/win_rate", percent),
                    with_interval(last, "eval/kl_to_prior"),
                    f"{done.steps} steps, {duration(seconds)}",
                ]
            )
        columns = [
            "Run",
            "Iterations",
            "Held-out reward",
            "Change",
            "Win-rate over start",
            "KL to prior (nats)",
            "Made",
        ]
        caption = "Each run's last evaluation. Runs compare where they were evaluated on the same prompts."
        return Table("Final validations", caption, columns, rows)

    def _settings(self) -> Table:
        flat = [_flat(run.report.config, run.report.config.get("run_dir")) for run in self._runs]
        names = [name for name in dict.fromkeys(name for one in flat for name in one) if name != "run_dir"]
        rows = [[name, *(one.get(name, "–") for one in flat)] for name in names]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        caption = "Keys whose values differ between the runs." if rows else "The configurations are the same."
        return Table("Settings that differ", caption, ["Key", *(run.name for run in self._runs)], rows)


def _flat(section: Mapping[str, Any], run_dir: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as texts, in which the run's own directory has no name."""
    found: dict[str, str] = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, run_dir, f"{prefix}{name}.")
        else:
            text = "null" if value is None else str(value)
            found[f"{prefix}{name}"] = text.replace(run_dir, "${run_dir}") if isinstance(run_dir, str) else text
    return found
