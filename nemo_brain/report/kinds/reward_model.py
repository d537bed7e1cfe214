"""The report of a reward model's training: how often, and how surely, it prefers the chosen outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from nemo_brain.report.charts import Panel, Records, Series, reliability_diagram
from nemo_brain.report.kinds.base import Cell, Comparison, Note, Row, Rows, Tile, level
from nemo_brain.report.kinds.epochs import EpochReport
from nemo_brain.report.text import interval, nats, number, percent, signed, with_interval

CHANCE = math.log(2)
tenths = partial(percent, decimals=1)


class RewardModelReport(EpochReport):
    """Of preference pairs."""

    title = "Reward model"
    examples = "pairs"
    samples_title = "Held-out pairs, before and after"
    explanation = (
        "A pair is right where the chosen output has the higher reward; a tie counts half. The accuracy carries a 95% "
        "Wilson score interval over pairs. The confidence of a pair is the probability that the model gives to the "
        "output it prefers, the sigmoid of the gap between the rewards; the calibration error is the mean over pairs "
        "of their bin's |confidence − accuracy|. The log-loss is in nats, 0.693 by guessing; the training loss adds "
        "margins and centering where they are configured."
    )

    def eval_verdict(self) -> str:
        last, now = self.last, with_interval(self.last, "eval/accuracy", tenths)
        on = f"On {number(last.get('eval/pairs'))} held-out pairs"
        if not self.trained:
            return f"{on}, the start model prefers the chosen output in {now}."
        low, high = _bounds(last)
        start_low, start_high = _bounds(self.start)
        if math.isnan(start_low + low):
            return f"{on}, the model prefers the chosen output in {now}."
        before = with_interval(self.start, "eval/accuracy", tenths)
        # Two intervals apart exclude zero for the difference however the pairs' answers are correlated.
        if low <= start_high and start_low <= high:
            return f"{on}, the accuracy shows no clear change: {before} at the start, {now} now."
        return f"{on}, the accuracy {'rose' if low > start_high else 'fell'} from {before} to {now}."

    def tiles(self) -> list[Tile]:
        last, found = self.last, []

        def tile(title: str, name: str, text: Any, words: str) -> None:
            if last.get(name) is not None:
                known = self.trained and self.start.get(name) is not None
                before = [f"from {text(self.start[name])}"] if known else []
                found.append(Tile(title, text(last[name]), ", ".join([*before, *([words] if words else [])])))

        tile("Held-out accuracy", "eval/accuracy", tenths, interval(last, "eval/accuracy", tenths))
        tile("Log-loss", "eval/log_loss", nats, f"{nats(CHANCE)} by guessing")
        tile("Calibration error", "eval/calibration_error", tenths, "mean |confidence − accuracy|")
        if (gap := _gap(last)) is not None:
            chosen, rejected = (number(last[f"eval/{name}_reward"]) for name in ("chosen", "rejected"))
            before = f"from {signed(_gap(self.start))}, " if self.trained and _gap(self.start) is not None else ""
            found.append(Tile("Reward gap", signed(gap), f"{before}chosen {chosen}, rejected {rejected}"))
        tile("Mean reward", "eval/reward", number, f"standard deviation {number(last.get('eval/reward_std'))}")
        return found + self.training_tiles()

    def panels(self) -> list[Panel]:
        evals = self.of_kind("eval")
        x = [r["step"] for r in evals]
        before = self.start if self.trained else {}
        calibration = [("start model", "c2", before), ("latest" if self.trained else "start model", "c1", self.last)]
        return [
            self.panel(
                "step",
                "Loss",
                "The held-out log-loss; the training loss, with margins and centering.",
                self.curve("step", "loss", "training", "c2"),
                self.held_out("eval/log_loss", "held-out log-loss"),
                level(CHANCE, "guessing", ":"),
            ),
            self.panel(
                "step",
                "Accuracy",
                "Share of pairs whose chosen output has the higher reward.",
                self.curve("step", "accuracy", "training", "c2"),
                self.held_out("eval/accuracy"),
                level(0.5, "guessing", ":"),
                percents=True,
            ),
            reliability_diagram([(label, c, record.get("eval/reliability")) for label, c, record in calibration]),
            self.panel(
                "step",
                "Reward gap",
                "Mean reward of the chosen outputs minus that of the rejected ones.",
                self.curve("step", "reward_gap", "training", "c2"),
                Series("held-out", x, [_gap(r) for r in evals], "c1", "o-"),
                level(0.0, "no difference", ":"),
            ),
            self.panel(
                "eval",
                "Rewards",
                "Held-out means; the band is one standard deviation of all rewards to each side of their mean.",
                self.held_out("eval/chosen_reward", "chosen", "c3"),
                self.held_out("eval/rejected_reward", "rejected", "c2"),
                Series("all", x, [r.get("eval/reward") for r in evals], "ink-soft", "--", *_spread(evals)),
            ),
            *self.training_panels(),
        ]

    def comparison(self) -> Comparison | None:
        epochs, found = self.before_and_after()
        if not found:
            return None
        rows, gaps = [], []
        for before, after in found:
            rewards = [[output["reward"] for output in sample["outputs"]] for sample in (before, after)]
            gaps.append([None if None in (c, r) else c - r for c, r in rewards])
            outputs = [
                Cell(output["text"], Note(f"reward {number(old)} → {number(new)}"))
                for output, old, new in zip(after["outputs"], *rewards, strict=True)
            ]
            marks = [Cell(note=_mark(gap)) for gap in gaps[-1]]
            rows.append(Row([Cell(before.get("prompt")), *outputs, *marks], gaps[-1][1] or 0.0))
        right, wrong = (
            [sum(test(g) for g in side if g is not None) for side in zip(*gaps, strict=True)]
            for test in (lambda gap: gap > 0, lambda gap: gap < 0)
        )
        return Comparison(
            f"Rewards of the start model and after epoch {epochs}",
            [
                Note(f"{right[1]} right (before: {right[0]})", "good"),
                Note(f"{wrong[1]} wrong (before: {wrong[0]})", "bad"),
            ],
            [("Prompt", "24%"), ("Chosen", ""), ("Rejected", ""), ("Gap before", "110px"), ("Gap after", "110px")],
            rows,
            ("largest gap first", "wrong orders first"),
        )

    def eval_summary(self) -> Rows:
        last = self.last
        before = f"{tenths(self.start.get('eval/accuracy'))} -> " if self.trained and self.start else ""
        accuracy = with_interval(last, "eval/accuracy", tenths)
        spread = f"standard deviation {number(last.get('eval/reward_std'))}"
        error = tenths(last.get("eval/calibration_error"))
        bins = last.get("eval/reliability") or []
        return [
            ("accuracy", f"{before}{accuracy} on {number(last.get('eval/pairs'))} pairs"),
            ("log-loss", f"{nats(last.get('eval/log_loss'))} nats ({nats(CHANCE)} by guessing)"),
            ("reward", f"{number(last.get('eval/reward'))}, {spread}"),
            ("calibration", f"mean error {error}; confidence, accuracy, pairs:"),
            *(("", f"{percent(b['confidence'])}  {percent(b['accuracy'])}  {b['pairs']}") for b in bins),
        ]


def _bounds(record: Mapping[str, Any]) -> list[float]:
    """The accuracy's interval, NaN where it is not known."""
    ends = [record.get(f"eval/accuracy_ci_{side}") for side in ("low", "high")]
    return [math.nan if end is None else end for end in ends]


def _gap(record: Mapping[str, Any]) -> float | None:
    chosen, rejected = record.get("eval/chosen_reward"), record.get("eval/rejected_reward")
    return None if chosen is None or rejected is None else chosen - rejected


def _spread(evals: Records) -> list[list[float | None]]:
    """The mean reward minus, and plus, a standard deviation."""
    known: list[tuple[Any, Any]] = [(r.get("eval/reward"), r.get("eval/reward_std")) for r in evals]
    return [[None if None in pair else pair[0] + sign * pair[1] for pair in known] for sign in (-1, 1)]


def _mark(gap: float | None) -> Note:
    if gap is None:
        return Note("n/a")
    if gap == 0:
        return Note("= tie")
    return Note(f"✓ {signed(gap)}", "good") if gap > 0 else Note(f"✗ {signed(gap)}", "bad")
