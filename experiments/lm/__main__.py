"""``python -m experiments.lm [processes]``: makes the runs that are missing, draws charts, fills the page's tables.

The directory in the environment variable DATA holds the data of the tasks that need it: see ``tasks``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from experiments.lm import page
from experiments.lm.model import smollm_tokenizer
from experiments.lm.plan import TUNED_ON, Plan
from experiments.lm.pool import Pool
from experiments.lm.runs import make_run
from experiments.lm.world import settings, world_name
from experiments.results import Results

RESULTS = Path(__file__).with_name("result.json")


def main(processes: int) -> None:
    results, tokenizer = Results(RESULTS), smollm_tokenizer()
    names = {task: world_name(task, tokenizer) for task in settings()["tasks"]}
    plan = Plan(settings(), {task: name for task, name in names.items() if name})
    # What depends on the tuning is known when the stages before it are made.
    stages = [
        lambda: [plan.priors()[TUNED_ON], *(run for runs in plan.grid().values() for run in runs)],
        lambda: [run for runs in plan.win_rates(results).values() for run in runs],
        lambda: list(plan.variances().values()),
        *(partial(_task, plan, results, task) for task in plan.worlds if task != TUNED_ON),
    ]
    with Pool(processes) as pool:
        for stage in stages:
            pool.fill(results, make_run, stage())
            page.fill(plan, results)


def _task(plan: Plan, results: Results, task: str) -> list[dict[str, Any]]:
    return [plan.priors()[task], *plan.compared(results)[task].values()]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
