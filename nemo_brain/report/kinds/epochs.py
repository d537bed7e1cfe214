"""What the reports of trainings by epochs have in common: fine-tuning and reward models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_brain.report.charts import Panel
from nemo_brain.report.kinds.base import Report, Rows, Tile
from nemo_brain.report.text import duration, nats


class EpochReport(Report):
    """Of epochs over fixed examples; ``examples`` says what they are."""

    examples = "examples"
    expected: ClassVar = {
        "step": "no optimizer step has been made yet",
        "eval": "no examples are held out, or they have not been evaluated yet",
    }

    @property
    def start(self) -> Mapping[str, Any]:
        """The evaluation before the first epoch; {} where the run has none."""
        first = self.run.start or {}
        return first if first.get("epoch") is None else {}

    @property
    def trained(self) -> bool:
        """Whether the last evaluation came after an epoch."""
        return self.last.get("epoch") is not None

    def progress(self) -> str:
        steps = f"{self.run.steps} optimizer steps"
        epochs = [r["epoch"] for r in self.of_kind("step") if r.get("epoch") is not None]
        trainer = self.config.get("trainer")
        planned = trainer.get("epochs") if isinstance(trainer, dict) else None
        of = f" of {planned}" if planned else ""
        return f"epoch {epochs[-1] + 1}{of}, {steps}" if epochs else steps

    def verdict(self) -> str:
        if self.run.last is None:
            losses = [r["loss"] for r in self.of_kind("step") if r.get("loss") is not None]
            change = f" The training loss went from {nats(losses[0])} to {nats(losses[-1])}." if losses else ""
            return f"No held-out {self.examples} have been evaluated.{change}"
        return self.eval_verdict()

    def eval_verdict(self) -> str:
        """The verdict where there is an evaluation."""
        raise NotImplementedError

    def eval_summary(self) -> Rows:
        """The last evaluation in names and texts."""
        raise NotImplementedError

    def training_tiles(self) -> list[Tile]:
        run, found = self.run, []
        if run.step_seconds:
            words = f"{run.steps} optimizer steps, without evaluations"
            found.append(Tile("Training time", duration(run.step_seconds), words))
        if run.train_tokens_per_second:
            words = "tokens/s over all optimizer steps"
            found.append(Tile("Training speed", f"{run.train_tokens_per_second:,.0f}", words))
        return found

    def training_panels(self) -> list[Panel]:
        rate = self.curve("step", "lr", "learning rate")
        return [
            self.panel("step", "Learning rate", "As each step was made with it.", rate, zero=True),
            self.gradient_norm_panel(),
            self.speed_panel("Over the optimizer steps, evaluations apart."),
        ]

    def summary(self) -> Rows:
        run = self.run
        rows = super().summary() if run.last is None else self.eval_summary()
        speed = f", {run.train_tokens_per_second:,.0f} tokens/s" if run.train_tokens_per_second else ""
        rows.append(("training", f"{run.steps} steps in {duration(run.step_seconds)}{speed}"))
        model = self.config.get("model")
        if isinstance(model, dict) and model.get("export_to"):
            rows.append(("model", model["export_to"]))
        return rows
