"""The charts' style: SVG on no ground, in colours that a light and a dark page both show."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, LINE = "#767f89", "#9aa1a933"  # text is 4.1 : 1 on white and 4.6 : 1 on GitHub's black
COLOURS = {
    "brain": "#3f83f8",
    "dpo_sft": "#e8730c",
    "rloo": "#12a150",
    "gdc++": "#b45fd6",
    "dpg": "#d64545",
    "snis": "#12a150",
    "dpo": "#c79a00",
    "slic": "#d64545",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_brain",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.facecolor": "none",
    "grid.color": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
}


def figure(panels: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A row of panels. Draw and save within ``style()``."""
    made = Figure(figsize=(width * panels, height), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def style():
    return matplotlib.rc_context(_STYLE)


def save(made: Figure, path: Path) -> None:
    """The same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, format="svg", metadata={"Date": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
