"""The charts of the report as inline SVG in the page's theme: curves, KL-reward frontier, time split, calibration."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from nemo_brain.report.text import number, percent

# Colours that stand for CSS variables: matplotlib draws with the key, the page shows the variable.
CURVES = tuple(f"c{number}" for number in range(1, 9))
COLOURS = {"#010101": "ink-soft", "#020202": "line"} | {f"#03030{name[1]}": name for name in CURVES}
_DRAWN = {variable: colour for colour, variable in COLOURS.items()}
CURVE_POINTS = 400  # longer curves are averaged down to this many
Records = Sequence[Mapping[str, Any]]

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "nemo_brain",
    "font.size": 9,
    "text.color": _DRAWN["ink-soft"],
    "axes.labelcolor": _DRAWN["ink-soft"],
    "axes.edgecolor": _DRAWN["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _DRAWN["line"],
    "grid.linewidth": 0.7,
    "xtick.color": _DRAWN["line"],
    "ytick.color": _DRAWN["line"],
    "xtick.labelcolor": _DRAWN["ink-soft"],
    "ytick.labelcolor": _DRAWN["ink-soft"],
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
}


@dataclass
class Series:
    """A curve: x and y (None where unknown), perhaps a band; without x, a level across the chart.

    ``colour`` is a CSS variable, ``style`` matplotlib's.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    style: str = "-"
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    def known(self) -> list[float]:
        return [v for v in self.y if v is not None]


@dataclass
class Panel:
    """A chart with its words. ``svg`` is None without data; ``needs`` then says what is missing."""

    title: str
    caption: str
    needs: str
    series: list[Series]
    svg: Markup | None


def line_chart(title: str, xlabel: str, series: Sequence[Series], zero: bool = False, percents: bool = False) -> Markup:
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure(xlabel)
        for s in series:
            colour, y = _DRAWN[s.colour], _floats(s.y)
            if not s.x:
                ax.axhline(y[0], color=colour, linestyle=s.style, linewidth=1.2)
                continue
            # A curve of one point would not be seen without its marker.
            ax.plot(s.x, y, s.style if len(s.x) > 1 else "o", color=colour, markersize=3.5)
            if s.low is not None and s.high is not None:
                ax.fill_between(s.x, _floats(s.low), _floats(s.high), color=colour, alpha=0.15, linewidth=0)
        xs = {x for s in series for x in s.x}
        if len(xs) == 1:
            ax.set_xlim(min(xs) - 1, min(xs) + 1)
        ax.xaxis.set_major_locator(_ticks(integer=True))
        if percents:
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if zero:
            ax.set_ylim(0, 1.1 * max((v for s in series for v in s.known()), default=1) or 1)
        return _svg(figure, title, "; ".join(map(_spoken, series)))


def frontier(runs: Sequence[tuple[Series, Records]]) -> Panel:
    """Reward over KL, a curve for the evaluations of each run; its series says how it is drawn, and in the legend what
    it is. The first and the last evaluation of a single one are named."""
    title, caption = "KL-reward frontier", "Each evaluation: reward against distance from the prior, 95% CI."
    names = ("eval/kl_to_prior", "eval/reward")
    drawn = [(s, [r for r in evals if all(r.get(name) is not None for name in names)]) for s, evals in runs]
    drawn = [(s, points) for s, points in drawn if points]
    if not drawn:
        return Panel(title, caption, needs("eval"), [], None)
    spoken = []
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure("KL to prior (nats per output)", "held-out reward")
        for series, points in drawn:
            x, y = ([r[name] for r in points] for name in names)
            colour = _DRAWN[series.colour]
            for axis, name in zip(("xerr", "yerr"), names, strict=True):
                ends = (_floats([r.get(f"{name}_ci_{side}") for r in points]) for side in ("low", "high"))
                sides = np.abs(np.array([end - [r[name] for r in points] for end in ends]))
                ax.errorbar(x, y, **{axis: sides}, fmt="none", ecolor=colour, alpha=0.35, elinewidth=1)
            ax.plot(x, y, series.style, color=colour, markersize=4, linewidth=0.8)
            said = f"From {number(x[0])} nats at reward {number(y[0])} to {number(x[-1])} at {number(y[-1])}"
            spoken.append(f"{series.label}: {said}" if len(runs) > 1 else said)
            for i in sorted({0, len(points) - 1}) if len(runs) == 1 else ():
                text = f"iteration {number(points[i].get('iteration'))}"
                offset, side = ((8, -10), "left") if i == 0 else ((-8, 8), "right")
                ax.annotate(text, (x[i], y[i]), xytext=offset, textcoords="offset points", ha=side)
        legend = [series for series, _ in drawn] if len(runs) > 1 else []
        return Panel(title, caption, "", legend, _svg(figure, title, "; ".join(spoken)))


def time_split(iterations: Records) -> Panel:
    title, caption = "Where the time goes", "Seconds per iteration."
    x = [r.get("iteration") for r in iterations]
    parts = [
        Series(label, *thinned(x, [r.get(f"{key}_seconds") for r in iterations], 100), colour, "s")
        for label, key, colour in (
            ("sampling", "sample", "c1"),
            ("scoring", "score", "c2"),
            ("training", "train", "c3"),
        )
    ]
    if not any(part.known() for part in parts):
        return Panel(title, caption, needs("iteration"), [], None)
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure("iteration")
        at = parts[0].x
        width = 0.8 * (at[1] - at[0] if len(at) > 1 else 1)
        bottom = np.zeros(len(at))
        for part in parts:
            height = np.nan_to_num(_floats(part.y))
            ax.bar(at, height, width, bottom=bottom, color=_DRAWN[part.colour])
            bottom += height
        ax.xaxis.set_major_locator(_ticks(integer=True))
        return Panel(title, caption, "", parts, _svg(figure, title, "; ".join(map(_spoken, parts))))


def reliability_diagram(diagrams: Sequence[tuple[str, str, Records | None]]) -> Panel:
    """Accuracy over confidence, a curve for each (label, colour, bins of ``preferences.reliability``); bars show how
    many pairs the bins of the last one hold."""
    title, caption = "Calibration", "How often the model is right where it is how sure; the bars count the pairs."
    drawn = [(label, colour, bins) for label, colour, bins in diagrams if bins]
    if not drawn:
        return Panel(title, caption, needs("eval"), [], None)
    curves = [
        Series(label, [b["confidence"] for b in bins], [b["accuracy"] for b in bins], colour, "o-")
        for label, colour, bins in drawn
    ]
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure("confidence", "accuracy")
        ax.plot([0.5, 1], [0.5, 1], "--", color=_DRAWN["ink-soft"], linewidth=1.2)
        for curve in curves:
            ax.plot(curve.x, _floats(curve.y), curve.style, color=_DRAWN[curve.colour], markersize=4)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(0.49, 1.01)
        ax.set_ylim(-0.02, 1.05)
        _, colour, bins = drawn[-1]
        sizes = ax.twinx()
        for b in bins:
            middle = (b["low"] + b["high"]) / 2
            sizes.bar(middle, b["pairs"], 0.9 * (b["high"] - b["low"]), color=_DRAWN[colour], alpha=0.2)
            sizes.annotate(number(b["pairs"]), (middle, b["pairs"]), ha="center", va="bottom")
        # The bars stay in the lower quarter.
        sizes.set_ylim(0, 4 * max(b["pairs"] for b in bins))
        sizes.set_axis_off()
        spoken = (f"{percent(b['confidence'])} sure: {percent(b['accuracy'])} of {b['pairs']} right" for b in bins)
        legend = [*curves, Series("perfect calibration", [], [], "ink-soft", "--")]
        return Panel(title, caption, "", legend, _svg(figure, title, "; ".join(spoken)))


def needs(kind: str) -> str:
    return f"metrics.jsonl has no {kind} record with it yet"


def thinned(x: Sequence[Any], y: Sequence[Any], points: int = CURVE_POINTS) -> tuple[list[Any], list[float | None]]:
    """A curve as it is up to ``points`` points, else the means of that many runs of neighbours."""
    pairs = list(zip(x, y, strict=True))
    size = max(1, math.ceil(len(pairs) / points))
    runs = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [mean([a for a, _ in run]) for run in runs], [mean([b for _, b in run]) for run in runs]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known, None without any."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _figure(xlabel: str, ylabel: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 2.9), layout="constrained")
    ax = figure.add_subplot()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.yaxis.set_major_locator(_ticks())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    return figure, ax


def _ticks(integer: bool = False) -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=integer)


def _svg(figure: Figure, title: str, description: str) -> Markup:
    """The figure as an inline SVG element: theme colours, no clashing ids, no addresses, a label for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    label = escape(f"{title}. {description}")
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{label}" viewBox="\1">', svg)
    # Charts of one page share markers and clips: each gets ids of its own.
    slug = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r' id="', f' id="{slug}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{slug}-', svg)
    svg = svg.replace("url(#", f"url(#{slug}-")
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def _spoken(series: Series) -> str:
    known = series.known()
    return f"{series.label}: {number(known[0])} to {number(known[-1])}" if known else f"{series.label}: no data"


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=float)
