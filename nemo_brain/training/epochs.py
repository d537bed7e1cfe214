"""Training by epochs over fixed examples, some of them held out: what fine-tuning and reward models have in common.

Every rank holds all examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nemo_brain.config.common import EpochConfig
from nemo_brain.core.groups import Group
from nemo_brain.core.interruption import Interrupted
from nemo_brain.data.examples import Example
from nemo_brain.data.order import shuffled
from nemo_brain.report.progress import progress
from nemo_brain.training.frame import Frame, State, Steps

AnyExample = TypeVar("AnyExample", bound=Example)


@dataclass
class EpochState(State):
    """evaluated: epochs before the last evaluation, None before the first. evaluation: its metrics."""

    evaluated: int | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class EpochStep(Generic[AnyExample]):
    """The batch of an optimizer step: the examples of a global batch, the same on every rank."""

    examples: Sequence[AnyExample]

    @property
    def groups(self) -> Sequence[Group]:
        return [example.group for example in self.examples]


def steps_per_epoch(examples: Sequence[Any], global_batch_size: int) -> int:
    """Batches of an epoch are of equal size, give or take one example."""
    return -(-len(examples) // global_batch_size)


class EpochLoop(Generic[AnyExample]):
    """Steps on the examples, an evaluation before the first and after each epoch.

    A subclass says what is recorded of a step and of the held-out examples.

    Args:
        config: the training's configuration.
        frame: of the training.
        examples: of the training.
        held_out: evaluated before and after; none of them: no evaluation.
    """

    def __init__(
        self,
        config: EpochConfig,
        frame: Frame[EpochState],
        examples: Sequence[AnyExample],
        held_out: Sequence[AnyExample],
    ):
        self.config = config
        self.frame = frame
        self.examples = examples
        self.held_out = held_out

    def step_metrics(self, result: Any) -> Mapping[str, Any]:
        """What is recorded of a step, besides what every training records."""
        raise NotImplementedError

    def eval_metrics(self) -> dict[str, Any]:
        """The metrics of the held-out examples. All ranks call it together."""
        raise NotImplementedError

    def score(self, metrics: Mapping[str, Any]) -> float:
        """Of an evaluation, higher is better: ``checkpoint.keep_best``."""
        raise NotImplementedError

    def shown_groups(self) -> Sequence[Group]:
        """Of the first ``validation.samples`` held-out examples, as the model has them now. All ranks call it."""
        raise NotImplementedError

    def steps(self) -> Steps:
        """All epochs."""
        state, epochs = self.frame.state, self.config.trainer.epochs
        count = steps_per_epoch(self.examples, self.config.train.global_batch_size)
        self._evaluate(state.step // count, state.step % count)
        for epoch in range(state.step // count, epochs):
            with progress(count, f"epoch {epoch}: training", "steps") as bar:
                bar.update(state.step % count)
                for batch, last in self._batches(epoch, state.step % count, count):
                    yield from self.frame.step(batch, {"epoch": epoch}, self.step_metrics)
                    bar.update(1)
                    if not last:
                        self.frame.save_point()
            if epoch + 1 == epochs:
                self.frame.interruption.ignore()  # what is left is short, and nothing to go on with
            self._evaluate(epoch + 1, 0)
            self.frame.save_point(last=epoch + 1 == epochs)

    def _batches(self, epoch: int, start: int, count: int) -> Iterator[tuple[EpochStep[AnyExample], bool]]:
        """The epoch's batches from ``start`` on, and whether each is its last."""
        size = len(self.examples)
        order = shuffled(size, f"{self.config.seed}/{epoch}")
        for index in range(start, count):
            members = order[index * size // count : (index + 1) * size // count]
            yield EpochStep([self.examples[i] for i in members]), index + 1 == count

    def _evaluate(self, epochs: int, within: int) -> None:
        """After ``epochs`` epochs and ``within`` steps of the next, if an evaluation is due and still to be made."""
        state = self.frame.state
        if not self.held_out or within or state.evaluated == epochs:
            return
        with self.frame.saved_if_interrupted():
            if self.frame.interruption.agreed()[0]:
                raise Interrupted(self.frame.interruption.reason)
            self.frame.strategy.wait_for_param_gather()
            metrics = self.eval_metrics()
            shown = self.shown_groups() if self.config.validation.samples else []
        state.evaluation, state.evaluated, state.score = metrics, epochs, self.score(metrics)
        self.frame.write("eval", {"epoch": epochs - 1 if epochs else None, **metrics})
        last = epochs == self.config.trainer.epochs
        self.frame.write_samples(epochs, shown, "start" if not epochs else "final" if last else "validation")
