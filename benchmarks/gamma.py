"""What each gamma makes of the quickstart: python benchmarks/gamma.py [DIRECTORY] [KEY=VALUE ...]

Trains it with each of GAMMAS, one after another, in DIRECTORY/GAMMA (runs/gamma), and prints a table of gamma against
effective sample size, KL to the prior and reward; it stands in DIRECTORY/table.md too, after each run with what there
is. A run that has finished is not made again, one that was stopped goes on. The keys are for all runs, which are about
four minutes each on two cores that do nothing else: ``--config-name=toy`` tries it out in seconds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_brain.report.metrics import read_metrics
from nemo_brain.report.run_dir import read_status
from nemo_brain.report.text import number, percent, signed, with_interval

GAMMAS = (0.02, 0.05, 0.1, 0.2, 0.5)
HEADS = ("gamma", "ESS, first iteration", "ESS, last", "KL to prior, nats", "held-out reward", "change", "win-rate")


def row(gamma: float, run_dir: Path) -> list[str]:
    """A finished run's line of the table."""
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    last = [record for record in records if record["kind"] == "eval"][-1]

    def size(iteration: int) -> str:
        sizes = [step["ess_alpha"] for step in steps if step["iteration"] == iteration]
        return number(sum(sizes) / len(sizes))

    return [
        f"{gamma:g}",
        size(0),
        size(steps[-1]["iteration"]),
        with_interval(last, "eval/kl_to_prior"),
        with_interval(last, "eval/reward"),
        with_interval(last, "eval/reward_difference", signed),
        with_interval(last, "eval/win_rate", percent),
    ]


def table(directory: Path) -> str:
    """Of the runs that have finished, in Markdown."""
    done = [gamma for gamma in GAMMAS if read_status(directory / f"{gamma:g}").get("state") == "finished"]
    lines: list[Any] = [HEADS, ["---"] * len(HEADS), *(row(gamma, directory / f"{gamma:g}") for gamma in done)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> None:
    directory = Path(arguments.pop(0) if arguments and "=" not in arguments[0] else "runs/gamma")
    named = any(word.startswith("--config-name") for word in arguments)
    options = [*([] if named else ["--config-name=quickstart"]), *arguments]
    for gamma in GAMMAS:
        run_dir = directory / f"{gamma:g}"
        if read_status(run_dir).get("state") != "finished":
            # It may be stopped at any moment, so that it has to have checkpoints.
            keys = [f"run_dir={run_dir}", f"objective.gamma={gamma:g}", "model.export_to=null"]
            keys += ["checkpoint.every_steps=4", "checkpoint.keep_last=1"]
            subprocess.run([sys.executable, "-m", "nemo_brain", "train", *options, *keys], check=True)
        (directory / "table.md").write_text(table(directory), encoding="utf-8")
    print(table(directory))


if __name__ == "__main__":
    main(sys.argv[1:])
