"""``python -m experiments [figure2 ...]``: makes the runs that are missing, draws charts, fills the page's tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
import yaml

from experiments import page, plots
from experiments.results import Results
from experiments.world import make_world

FOLDER = Path(__file__).parent
FIGURES = ("figure2", "figure3", "figure4", "baseline")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    world = make_world()
    for name in names or FIGURES:
        results = Results(FOLDER / name / "result.json")
        settings = yaml.safe_load((FOLDER / name / "settings.yaml").read_text(encoding="utf-8"))
        with plots.style():
            drawn, text = importlib.import_module(f"experiments.{name}.figure").make(world, settings, results)
            if drawn is not None:
                plots.save(drawn, page.PAGE.with_name("figures") / f"{name}.svg")
        made = f"`python -m experiments {name}`: {results.made()}; {len(results)} runs."
        text = page.with_block(page.PAGE.read_text(encoding="utf-8"), name, f"{made}\n\n{text}")
        page.PAGE.write_text(text, encoding="utf-8")
        print(f"{name}: {len(results)} runs")


if __name__ == "__main__":
    main(sys.argv[1:])
