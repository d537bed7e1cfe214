"""Which runs the figures need, from settings.yaml; what depends on tuning comes once that is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.results import Results

Run = dict[str, Any]
TUNED_ON = "synopses"  # the task whose tuning prompts choose every method's setting


@dataclass(frozen=True)
class Plan:
    """The runs of settings.yaml for the tasks whose data is given.

    Attributes:
        worlds: by task, its name in runs' settings.
    """

    settings: dict[str, Any]
    worlds: dict[str, str]

    def priors(self) -> dict[str, Run]:
        return {task: {"kind": "prior", **self._task(task), **self.settings["prior"]} for task in self.worlds}

    def grid(self) -> dict[str, list[Run]]:
        """By method, every coefficient with every rate."""
        rates = self.settings["rates"]
        return {
            name: [self._run(TUNED_ON, name, value, rate) for value in method["values"] for rate in rates]
            for name, method in self.settings["methods"].items()
        }

    def chosen(self, results: Results) -> dict[str, Run]:
        """By method, the run of the grid with the best score on the tuning prompts."""
        return {
            name: max(runs, key=lambda run: self.score(results[run]["tuning"])) for name, runs in self.grid().items()
        }

    def score(self, found: dict[str, float]) -> float:
        return found["reward"] - self.settings["score_gamma"] * found["kl"]

    def frontier(self) -> dict[str, list[Run]]:
        """By method, figure 2's runs."""
        return {name: self.grid()[name] for name in self.settings["frontier"]}

    def compared(self, results: Results) -> dict[str, dict[str, Run]]:
        """By task and method, the chosen setting's run."""
        found = {TUNED_ON: self.chosen(results)}
        for task in self.worlds.keys() - found.keys():
            found[task] = {
                name: self._run(task, name, self._value(name, run), run["rate"])
                for name, run in found[TUNED_ON].items()
            }
        return {task: found[task] for task in self.worlds}

    def made(self, results: Results) -> list[str]:
        """The tasks whose comparison is there. KeyError: none is."""
        runs = {task: [self.priors()[task], *some.values()] for task, some in self.compared(results).items()}
        found = [task for task, some in runs.items() if all(run in results for run in some)]
        if not found:
            raise KeyError(TUNED_ON)
        return found

    def win_rates(self, results: Results) -> dict[tuple[str, int], list[Run]]:
        """By design and n, a run for each seed: nested outputs of one file, so that the proposal is the prior."""
        base, sizes = self.chosen(results)["brain"], self.settings["win_rate"]["sizes"]
        found = {}
        for design in ("prompts", "outputs"):
            for n in sizes:
                draws = n if design == "prompts" else max(sizes)
                over = {"n": n, "draws": draws, "refresh": "never", "evaluated_on": ["heldout"]}
                found[design, n] = [{**base, **over, "seed": seed} for seed in self.settings["win_rate"]["seeds"]]
        return found

    def variances(self) -> dict[str, Run]:
        """By proposal."""
        shared = {name: value for name, value in self.settings["variance"].items() if name != "proposals"}
        return {
            proposal: {"kind": "variance", **self._task(TUNED_ON), **shared, "proposal": proposal}
            for proposal in self.settings["variance"]["proposals"]
        }

    def _task(self, task: str) -> Run:
        return {"task": task, "world": self.worlds[task]}

    def _value(self, name: str, run: Run) -> float:
        return run["objective"][self.settings["methods"][name]["coefficient"]]

    def _run(self, task: str, name: str, value: float, rate: float) -> Run:
        method = self.settings["methods"][name]
        return {
            "kind": "train",
            **self._task(task),
            **self.settings["train"],
            "objective": {**method["objective"], method["coefficient"]: value},
            "n": method["n"],
            "refresh": method["refresh"],
            "rate": rate,
            "evaluated_on": ["tuning", "heldout"] if task == TUNED_ON else ["heldout"],
        }
