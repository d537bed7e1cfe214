"""``python -m experiments.lm [processes]``: makes the runs that are missing, draws charts, fills the page's tables.

The directory in the environment variable DATA holds the data of the tasks that need it: see ``tasks``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.lm import page
from experiments.lm.plan import Plan
from experiments.lm.pool import Pool
from experiments.lm.runs import make_run, prepare
from experiments.lm.world import settings
from experiments.results import Results

RESULTS = Path(__file__).with_name("result.json")


def main(processes: int) -> None:
    results, tasks = Results(RESULTS), settings()["tasks"]
    with Pool(processes) as pool:
        plan = Plan(
            settings(), {task: name for task, name in zip(tasks, pool.call(prepare, tasks), strict=True) if name}
        )
        grid = [run for runs in plan.grid().values() for run in runs]
        # What depends on the tuning is known when the stages before it are made.
        stages = [
            lambda: [*grid, *plan.priors().values()],
            lambda: [
                *(run for runs in plan.frontier(results).values() for run in runs),
                *(run for runs in plan.compared(results).values() for run in runs.values()),
            ],
            lambda: [run for runs in plan.win_rates(results).values() for run in runs],
            lambda: list(plan.variances().values()),
        ]
        for stage in stages:
            pool.fill(results, make_run, stage())
            page.fill(plan, results)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
