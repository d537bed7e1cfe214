"""The report of supervised fine-tuning: the loss on held-out completions, and what the model answers."""

from __future__ import annotations

import math

from nemo_brain.report.charts import Panel
from nemo_brain.report.kinds.base import Cell, Comparison, Note, Row, Rows, Tile, level
from nemo_brain.report.kinds.epochs import EpochReport
from nemo_brain.report.text import nats, number


class SFTReport(EpochReport):
    """Of completions."""

    title = "Supervised fine-tuning"
    examples = "completions"
    explanation = (
        "Losses are in nats per token of the completions, prompts not counted; the held-out loss is over all tokens of "
        "the held-out completions together, and perplexity is its exponential. A training step's loss is of that "
        "step's completions before the step. Outputs are sampled at temperature 1 with the same draws each time."
    )

    def eval_verdict(self) -> str:
        loss, perplexity = self.last.get("eval/loss"), number(self.last.get("eval/perplexity"))
        before = self.last.get("eval/start_loss")
        on = f"On {self._size()}"
        if not self.trained or loss is None or before is None:
            whose = "model's" if self.trained else "start model's"
            return f"{on}, the {whose} loss is {nats(loss)} nats per token, perplexity {perplexity}."
        change = "fell" if loss < before else "rose" if loss > before else "stayed"
        ends = f"from {nats(before)} to {nats(loss)} nats per token"
        lowest = min((r for r in self.of_kind("eval") if r.get("eval/loss") is not None), key=lambda r: r["eval/loss"])
        after = "at the start" if lowest.get("epoch") is None else f"after epoch {lowest['epoch'] + 1}"
        earlier = f" It was lower {after}: {nats(lowest['eval/loss'])}." if lowest["eval/loss"] < loss else ""
        return f"{on}, the loss {change} {ends}, perplexity {self._start_perplexity()} to {perplexity}.{earlier}"

    def tiles(self) -> list[Tile]:
        last, found = self.last, []
        before = last.get("eval/start_loss") if self.trained else None
        if (loss := last.get("eval/loss")) is not None:
            change = "of the start model" if before is None else f"from {nats(before)}, {loss - before:+.3f}"
            found.append(Tile("Held-out loss", nats(loss), f"{change}, nats per token"))
        if last.get("eval/perplexity") is not None:
            words = "of the start model" if before is None else f"from {self._start_perplexity()}"
            found.append(Tile("Held-out perplexity", number(last["eval/perplexity"]), words))
        return found + self.training_tiles()

    def panels(self) -> list[Panel]:
        return [
            self.panel(
                "step",
                "Loss",
                "Nats per token of the completions; a held-out loss that rises while the other falls is overfitting.",
                self.curve("step", "loss", "training", "c2"),
                self.held_out("eval/loss", "held-out"),
                level(self.last.get("eval/start_loss"), "start model, held-out", ":"),
            ),
            *self.training_panels(),
        ]

    def comparison(self) -> Comparison | None:
        epochs, found = self.before_and_after()
        if not found:
            return None
        rows = []
        for before, after in found:
            reference = before.get("reference")
            outputs = [
                Cell(text, Note("is the demonstration", "good") if text == reference else None)
                for text in (sample["outputs"][0]["text"] for sample in (before, after))
            ]
            rows.append(Row([Cell(before.get("prompt")), Cell(reference), *outputs]))
        columns = [("Prompt", ""), ("Demonstration", ""), ("Start model", ""), (f"After epoch {epochs}", "")]
        return Comparison("One sampled output each, with the same draws before and after", [], columns, rows)

    def eval_summary(self) -> Rows:
        last = self.last
        change = f"{nats(last.get('eval/start_loss'))} -> {nats(last.get('eval/loss'))}"
        return [
            ("held-out loss", f"{change} nats per token, on {self._size('')}"),
            ("perplexity", f"{self._start_perplexity()} -> {number(last.get('eval/perplexity'))}"),
        ]

    def _start_perplexity(self) -> str:
        loss = self.last.get("eval/start_loss")
        return number(None if loss is None else math.exp(loss))

    def _size(self, held_out: str = "held-out ") -> str:
        tokens, completions = (self.last.get(f"eval/{name}") for name in ("completion_tokens", "completions"))
        return f"{number(tokens)} tokens of {number(completions)} {held_out}completions"
