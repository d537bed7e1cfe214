"""docs/figures-lm.md: charts and tables of the runs that are there."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from experiments import plots
from experiments.lm.figures import comparison, frontier, variance, win_rate
from experiments.lm.plan import Plan
from experiments.page import PAGE, with_block
from experiments.results import Results

LM_PAGE = PAGE.with_name("figures-lm.md")
Make = Callable[[Plan, Results], tuple[Figure | None, str]]
BLOCKS: dict[str, Make] = {
    "lm-tasks": comparison.tasks,
    "lm-comparison": comparison.make,
    "lm-figure2": frontier.make,
    "lm-figure3": variance.make,
    "lm-figure4": win_rate.make,
}


def fill(plan: Plan, results: Results) -> None:
    """Blocks whose runs are not all there say so."""
    text = LM_PAGE.read_text(encoding="utf-8")
    for name, make in BLOCKS.items():
        with plots.style():
            try:
                drawn, block = make(plan, results)
            except KeyError:  # of the results
                drawn, block = None, "Not made yet."
            if drawn is not None:
                plots.save(drawn, LM_PAGE.with_name("figures") / f"{name}.svg")
        text = with_block(text, name, block)
    minutes = sum(result["seconds"] for result in results.all()) / 60
    made = f"`make figures-lm`: {results.made()}; {len(results)} runs, {minutes:.0f} minutes of a core in all."
    LM_PAGE.write_text(with_block(text, "lm-made", made), encoding="utf-8")
