"""The report of a BRAIn run: held-out rewards against the start model's, and what the policy learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_brain.report.charts import Panel, Series, frontier, mean, time_split
from nemo_brain.report.kinds.base import Cell, Comparison, Note, Report, Row, Rows, Tile, level
from nemo_brain.report.text import duration, interval, number, p_text, percent, signed, with_interval

TRAIN_GROUPS = 8


class BRAInReport(Report):
    """Of iterations."""

    title = "BRAIn run"
    expected: ClassVar = {
        "iteration": "no iteration has finished yet",
        "eval": "no evaluation on held-out prompts has finished yet",
    }
    explanation = (
        "Intervals are 95% over prompts: a prompt's outputs are averaged first. Means carry a t interval, the win-rate "
        "a Wilson score interval; the change in reward is paired by prompt. KL is the mean of log q − log p over the "
        "policy's own outputs, in nats per output; it estimates the divergence if they were sampled at temperature 1."
    )
    eval_x = "iteration"

    def progress(self) -> str:
        objective = _section(self.config, "objective")
        name = objective.get("name") or objective.get("_target_")
        name = f"objective {name}" if name else ""
        gamma = f", γ = {objective['gamma']}" if name and "gamma" in objective else ""
        planned = _section(self.config, "trainer").get("max_iterations")
        of = f" of {planned}" if planned else ""
        done = f"{self.run.iterations}{of} iterations, {self.run.steps} optimizer steps"
        return f"{name}{gamma} · {done}" if name else done

    def verdict(self) -> str:
        if self.run.last is None:
            return "The run has not been evaluated on held-out prompts yet."
        last = self.last
        before, after = number(last.get("eval/start_reward")), number(last.get("eval/reward"))
        prompts = number(last.get("eval/prompts"))
        if last.get("iteration") == 0:
            return f"On {prompts} held-out prompts, the start model's mean reward is {after}."
        low, high = (last.get(f"eval/reward_difference_ci_{side}") for side in ("low", "high"))
        if low is None or high is None or low <= 0 <= high:
            change = f"shows no clear change: {before} at the start, {after} now"
        else:
            change = f"{'rose' if low > 0 else 'fell'} from {before} to {after}"
        evidence = "" if low is None or high is None else f" (change {_change(last)})"
        return f"On {prompts} held-out prompts, the mean reward {change}{evidence}."

    def tiles(self) -> list[Tile]:
        run, last, found = self.run, self.last, []
        if last.get("eval/reward") is not None:
            difference, p = last.get("eval/reward_difference"), p_text(last.get("eval/p_value"))
            words = f"from {number(last.get('eval/start_reward'))}, {signed(difference)}" + (p and f", {p}")
            found.append(Tile("Held-out reward", number(last["eval/reward"]), words))
        if last.get("eval/win_rate") is not None:
            words = interval(last, "eval/win_rate", percent)
            found.append(Tile("Win-rate over start", percent(last["eval/win_rate"]), words))
        if last.get("eval/kl_to_prior") is not None:
            words = interval(last, "eval/kl_to_prior")
            found.append(Tile("KL to prior", f"{number(last['eval/kl_to_prior'])} nats", words))
        if last.get("eval/reference_reward") is not None:
            words = "mean over the reference answers"
            found.append(Tile("Reference reward", number(last["eval/reference_reward"]), words))
        steps = [r for r in self.of_kind("step") if r.get("ess_alpha") is not None]
        if steps:
            n = self._outputs_per_prompt()
            size = f"{number(steps[-1]['ess_alpha'])}{f' of {n}' if n else ''}"
            found.append(Tile("Effective samples", size, "outputs per prompt, by weights α"))
        parts = {"sampling": run.sample_seconds, "scoring": run.score_seconds, "training": run.train_seconds}
        if spent := sum(parts.values()):
            shares = ", ".join(f"{name} {percent(seconds / spent)}" for name, seconds in parts.items())
            found.append(Tile("Time", duration(spent), shares))
        if run.train_tokens_per_second:
            memory = run.peak_memory_gib
            words = f"tokens/s, peak memory {number(memory)} GiB" if memory else "tokens/s over all optimizer steps"
            found.append(Tile("Training speed", f"{run.train_tokens_per_second:,.0f}", words))
        return found

    def panels(self) -> list[Panel]:
        curve, held_out, panel = self.curve, self.held_out, self.panel
        last, n = self.last, self._outputs_per_prompt()
        loss = [curve("step", "loss", "loss", "c2"), curve("step", "kl_alpha_beta", "KL(α‖β)")]
        if loss[0].y == loss[1].y:  # BRAIn's loss is this divergence; other objectives' losses are not
            loss = [Series("loss = KL(α‖β)", loss[1].x, loss[1].y, "c1")]
        return [
            panel(
                "iteration",
                "Reward",
                "Held-out prompts against the start model's level, and the outputs trained on.",
                held_out("eval/reward"),
                curve("iteration", "reward/mean", "training mean", "c2"),
                curve("iteration", "reward/best_of_n", f"training best of {n or 'n'}", "c3"),
                level(last.get("eval/start_reward"), "start model", ":"),
                level(last.get("eval/reference_reward"), "reference answers", "--"),
            ),
            panel(
                "iteration",
                "KL to the prior",
                "Nats per output: how far the policy has moved.",
                held_out("eval/kl_to_prior"),
                curve("iteration", "kl_to_prior", "training", "c2"),
            ),
            frontier([(self.held_out("eval/reward"), self.of_kind("eval"))]),
            panel(
                "eval",
                "Win-rate over the start model",
                "Share of output pairs with the higher reward, ties as half.",
                held_out("eval/win_rate", "win-rate, 95% CI"),
                level(0.5, "no difference", ":"),
                percents=True,
            ),
            panel(
                "step",
                "Effective sample size",
                "Outputs per prompt that carry weight; near 1, one output decides everything.",
                curve("step", "ess_alpha", "target weights α"),
                curve("step", "ess_beta", "policy weights β", "c2"),
                level(n, f"n = {n}", "--"),
                zero=True,
            ),
            panel("step", "Loss", "Divergence of the policy's weights from the target's.", *loss),
            self.gradient_norm_panel(),
            panel(
                "iteration",
                "Output length",
                "A drift here often explains a drift in reward.",
                curve("iteration", "outputs/length", "mean tokens of a training output"),
                zero=True,
            ),
            self.speed_panel("Over the optimizer steps, sampling and scoring apart."),
            time_split(self.of_kind("iteration")),
        ]

    def comparison(self) -> Comparison | None:
        latest, found = self.before_and_after()
        if not found:
            return None
        rows, differences = [], []
        for before, after in found:
            old, new = mean_reward(before), mean_reward(after)
            difference = None if old is None or new is None else new - old
            differences += [] if difference is None else [difference]
            reference = [(before["reference"], None)] if before.get("reference") else []
            cells = [
                Cell(before.get("prompt"), unfolds="reference answer", more=reference),
                outputs_cell(before),
                outputs_cell(after),
                Cell(note=_difference(difference)),
            ]
            rows.append(Row(cells, difference or 0.0))
        return Comparison(
            f"Start model against iteration {latest}",
            [
                Note(f"{sum(d > 0 for d in differences)} better", "good"),
                Note(f"{sum(d == 0 for d in differences)} the same"),
                Note(f"{sum(d < 0 for d in differences)} worse", "bad"),
            ],
            [("Prompt", "26%"), ("Start model", ""), (f"Iteration {latest}", ""), ("Change", "100px")],
            rows,
            ("largest gain first", "largest loss first"),
        )

    def training_groups(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """(iteration, groups) of the latest and of the first iteration trained on, outputs by falling weight."""
        train = [s for s in self.samples if s.get("kind") == "train"]
        iterations = sorted({s["iteration"] for s in train})
        chosen = [iterations[-1], iterations[0]] if len(iterations) > 1 else iterations
        found = []
        for iteration in chosen:
            groups = [s for s in train if s["iteration"] == iteration][:TRAIN_GROUPS]
            found.append(
                (
                    iteration,
                    [{**g, "outputs": sorted(g["outputs"], key=lambda o: -(o.get("weight") or 0.0))} for g in groups],
                )
            )
        return found

    def summary(self) -> Rows:
        run, last, rows = self.run, self.last, []
        if run.last is None:
            rows += super().summary()
        else:
            p = p_text(last.get("eval/p_value"))
            before, prompts = number(last.get("eval/start_reward")), number(last.get("eval/prompts"))
            change = with_interval(last, "eval/reward_difference", signed)
            rows += [
                ("held-out reward", f"{before} -> {with_interval(last, 'eval/reward')} on {prompts} prompts"),
                ("change", change + (p and f", {p} (paired t-test)")),
                ("win-rate over start", with_interval(last, "eval/win_rate", percent)),
                ("KL to prior", f"{with_interval(last, 'eval/kl_to_prior')} nats"),
            ]
            if last.get("eval/reference_reward") is not None:
                rows.append(("reference answers", f"{number(last['eval/reference_reward'])} mean reward"))
        time = [("sampling", run.sample_seconds), ("scoring", run.score_seconds), ("training", run.train_seconds)]
        seconds = ", ".join(f"{name} {duration(value)}" for name, value in time)
        rows.append(("time", f"{seconds} ({run.iterations} iterations, {run.steps} steps)"))
        if run.train_tokens_per_second is not None:
            rows.append(("training speed", f"{run.train_tokens_per_second:,.0f} tokens/s"))
        return rows

    def _outputs_per_prompt(self) -> int | None:
        n = _section(self.config, "rollout").get("outputs_per_prompt")
        return n if isinstance(n, int) else None


def _change(record: Mapping[str, Any]) -> str:
    name, p = "eval/reward_difference", p_text(record.get("eval/p_value"))
    return f"{signed(record.get(name))}, {interval(record, name, signed)}" + (p and f", paired t-test {p}")


def mean_reward(sample: Mapping[str, Any]) -> float | None:
    """Of a prompt's outputs in samples.jsonl."""
    return mean([output.get("reward") for output in sample["outputs"]])


def outputs_cell(sample: Mapping[str, Any]) -> Cell:
    """A prompt's outputs with their rewards."""
    outputs = sample["outputs"]
    count = len(outputs)
    note = Note(f"{f'mean reward of {count}' if count > 1 else 'reward'} {number(mean_reward(sample))}")
    more = [(output["text"], Note(f"reward {number(output.get('reward'))}")) for output in outputs[1:]]
    return Cell(outputs[0]["text"] if outputs else "", note, f"{count - 1} more", more)


def _difference(value: float | None) -> Note:
    if value is None:
        return Note("n/a")
    if value == 0:
        return Note("= 0")
    return Note(f"▲ {signed(value)}", "good") if value > 0 else Note(f"▼ {signed(value)}", "bad")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
