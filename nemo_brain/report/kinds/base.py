"""What a report consists of, whatever was trained. A subclass for each kind of training fills it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_brain.report.charts import Panel, Records, Series, line_chart, needs, thinned
from nemo_brain.report.metrics import summarize

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    name: str
    value: str
    explanation: str


@dataclass(frozen=True)
class Note:
    """A short text; ``tone`` is ``good``, ``bad`` or ``soft``."""

    text: str
    tone: str = "soft"


@dataclass(frozen=True)
class Cell:
    """A field of the table of samples: a text, more texts with a note each that unfold, and a note below."""

    text: str | None = None
    note: Note | None = None
    unfolds: str = ""
    more: Sequence[tuple[str, Note | None]] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table of samples; ``key`` is what it can be ordered by."""

    cells: Sequence[Cell]
    key: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Samples before and after.

    columns: a head for each cell and the width of its column ("" for what is left). orders: the words for falling and
    rising keys, None where the rows have none.
    """

    lead: str
    counts: Sequence[Note]
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    orders: tuple[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """Texts in columns, the first of which names the row."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Report:
    """A run of any kind, and by itself one that has not recorded anything yet.

    Args:
        records: of metrics.jsonl.
        samples: of samples.jsonl.
        config: of config.yaml, {} without.
    """

    title = "Training"
    # Kinds of records that there should be, and why they may be missing.
    expected: ClassVar[Mapping[str, str]] = {"step": "no optimizer step has been made yet"}
    samples_title = "Held-out prompts, before and after"
    explanation = ""
    eval_x = "step"  # the field of an evaluation that says when it was
    one_run = True  # whose samples and configuration are shown

    def __init__(self, records: Records, samples: Records, config: Mapping[str, Any]):
        self.records, self.samples, self.config = records, samples, config
        self.run = summarize(records)
        self.last = self.run.last or {}

    def progress(self) -> str:
        """How far the run has come."""
        return f"{self.run.steps} optimizer steps"

    def verdict(self) -> str:
        """What happened on the held-out examples, in one sentence or two."""
        return "Nothing has been recorded yet."

    def tiles(self) -> list[Tile]:
        """The headline numbers, those that are known."""
        return []

    def panels(self) -> list[Panel]:
        """Every chart, in reading order."""
        return []

    def tables(self) -> list[Table]:
        """Numbers that are compared with each other, below the charts."""
        return []

    def comparison(self) -> Comparison | None:
        """Held-out samples of the start model and the latest ones; None without both."""
        return None

    def training_groups(self) -> list[tuple[int, list[dict[str, Any]]]] | None:
        """Iterations with groups that were trained on; None where a training makes none."""
        return None

    def summary(self) -> Rows:
        """The end of the run in names and texts."""
        return [("held-out", "not evaluated")]

    def missing(self) -> list[str]:
        """What of metrics.jsonl and samples.jsonl is not there, and why."""
        kinds = {r.get("kind") for r in self.records}
        texts = [f"{kind} records in metrics.jsonl: {why}" for kind, why in self.expected.items() if kind not in kinds]
        return texts + ([] if self.samples else ["samples.jsonl: outputs are not shown"])

    def of_kind(self, kind: str) -> Records:
        """The records of one kind whose place on the x axis is known."""
        x = self._x(kind)
        return [r for r in self.records if r.get("kind") == kind and r.get(x) is not None]

    def curve(self, kind: str, name: str, label: str, colour: str = "c1") -> Series:
        """A metric over the records of one kind."""
        records = self.of_kind(kind)
        return Series(label, *thinned([r[self._x(kind)] for r in records], [r.get(name) for r in records]), colour)

    def held_out(self, name: str, label: str = "held-out, 95% CI", colour: str = "c1") -> Series:
        """A metric over the evaluations, with its confidence interval if it has one."""
        records = self.of_kind("eval")
        y, low, high = ([r.get(key) for r in records] for key in (name, f"{name}_ci_low", f"{name}_ci_high"))
        return Series(label, [r[self.eval_x] for r in records], y, colour, "o-", low, high)

    def panel(self, kind: str, title: str, caption: str, *series: Series, **options: bool) -> Panel:
        """A chart of curves, over optimizer steps or iterations, whose data come from the records of one kind."""
        known = [s for s in series if s.known()]
        x = self._x(kind)
        svg = line_chart(title, "optimizer step" if x == "step" else x, known, **options)
        return Panel(title, caption, needs(kind), known, svg if any(s.x for s in known) else None)

    def gradient_norm_panel(self) -> Panel:
        curve = self.curve("step", "grad_norm", "gradient norm")
        return self.panel("step", "Gradient norm", "Before clipping.", curve, zero=True)

    def speed_panel(self, caption: str) -> Panel:
        curve = self.curve("step", "tokens_per_second", "tokens per second")
        return self.panel("step", "Training speed", caption, curve, zero=True)

    def before_and_after(self) -> tuple[int | None, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
        """The iteration or the number of epochs of the latest held-out samples, and they, each behind the start
        model's for the same prompt."""
        before = {s["id"]: s for s in self.samples if s.get("kind") == "start"}
        later = [s for s in self.samples if s.get("kind") == "final"]
        later = later or [s for s in self.samples if s.get("kind") == "validation"]
        latest = max((s["iteration"] for s in later), default=None)
        return latest, [(before[s["id"]], s) for s in later if s["iteration"] == latest and s["id"] in before]

    def _x(self, kind: str) -> str:
        return {"step": "step", "iteration": "iteration", "eval": self.eval_x}[kind]


def level(value: float | None, label: str, style: str) -> Series:
    """A level across a chart."""
    return Series(label, [], [value], "ink-soft", style)
