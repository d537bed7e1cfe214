"""What every kind of training does around its optimizer steps: records, guards, save points, and going on from one.

A training is a generator (``Loop.steps``). It yields the batch of an optimizer step and gets back what came of it; all
that it does in between, sampling, evaluating, saving, stands in it in order. Lightning's side is in ``callbacks``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from nemo_brain.config.common import CheckpointConfig
from nemo_brain.core.groups import Group
from nemo_brain.core.interruption import Interrupted, Interruption
from nemo_brain.durability.checkpoint import read_json
from nemo_brain.durability.guards import nonfinite_message, write_groups
from nemo_brain.durability.saving import Checkpointer, restore_random_states
from nemo_brain.report.metrics import MetricsWriter, write_samples
from nemo_brain.report.run_dir import line_file_sizes, rewind, writing
from nemo_brain.training.strategy import PackedStrategy


class Batch(Protocol):
    """What an optimizer step is made on, the same on every rank."""

    @property
    def groups(self) -> Sequence[Group]: ...


@dataclass(frozen=True)
class Outcome:
    """What came of an optimizer step: the result of its passes, the gradient's norm before clipping, the learning rate
    that it was made with, its seconds, and whether it was left out because its gradient was not finite."""

    result: Any
    grad_norm: float | None
    lr: float
    seconds: float
    skipped: bool


Steps = Generator[Batch, Outcome, None]


@dataclass
class State:
    """Where a training stands. All of it goes into a checkpoint, beside weights and optimizer, and comes back whole.

    step: optimizer steps so far; score: the held-out score of the model as it is, None where it was not evaluated.
    """

    step: int = 0
    score: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def load_json(self, values: Mapping[str, Any]) -> None:
        """The inverse of ``as_json``."""
        for item in dataclasses.fields(self):
            setattr(self, item.name, values[item.name])


AnyState = TypeVar("AnyState", bound=State)


class Loop(Protocol):
    """A kind of training: what it does between its steps."""

    def steps(self) -> Steps:
        """From where ``Frame.state`` stands to the end. Called once, when the model has been set up and restored."""


class Frame(Generic[AnyState]):
    """The part of a training that all kinds have in common, on one rank.

    Args:
        strategy: of the model in training.
        state: where the training stands; a loop changes it as it goes.
        config: the ``checkpoint`` section.
        run_dir: where rank 0 writes.
        writer: of rank 0; None on the others.
        interruption: may end the run early.
        on_nonfinite: ``stop`` or ``skip``, what happens after a step whose gradient is not finite.
        record: what every checkpoint says of the run.
    """

    def __init__(
        self,
        strategy: PackedStrategy,
        state: AnyState,
        config: CheckpointConfig,
        run_dir: Path,
        writer: MetricsWriter | None,
        interruption: Interruption,
        on_nonfinite: str,
        record: Mapping[str, Any],
    ):
        self.strategy = strategy
        self.state = state
        self.run_dir = run_dir
        self.writer = writer
        self.interruption = interruption
        self._at_end = config.at_end
        self._on_nonfinite = on_nonfinite
        self._checkpointer = Checkpointer(config, run_dir / "checkpoints", record)

    def step(self, batch: Batch, head: Mapping[str, Any], metrics: Any) -> Generator[Batch, Outcome, Outcome]:
        """One optimizer step, recorded: ``head``, what ``metrics`` makes of the passes' result, and what is common.

        Raises:
            ValueError: on every rank, where its gradient is not finite and the run is to stop then.
        """
        outcome = yield batch
        result = outcome.result
        self.state.step += 1
        self.state.score = None
        self.write(
            "step",
            {
                **head,
                **metrics(result),
                "grad_norm": outcome.grad_norm,
                "lr": outcome.lr,
                "tokens": result.tokens,
                "step_seconds": outcome.seconds,
                "tokens_per_second": result.tokens / outcome.seconds,
            },
        )
        if outcome.skipped:
            if self.writer:
                with writing(self.run_dir):
                    write_groups(self.run_dir / f"nonfinite_step_{self.state.step}.jsonl", batch.groups)
            if self._on_nonfinite == "stop":
                raise ValueError(nonfinite_message(self.state.step))
        return outcome

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl."""
        if self.writer:
            self.writer.write(kind, self.state.step, fields)

    def write_samples(self, iteration: int, groups: Sequence[Group], kind: str, alpha: Any = None) -> None:
        """Groups for samples.jsonl and the loggers; see ``report.metrics.write_samples``."""
        if self.writer:
            self.writer.write_samples(self.state.step, write_samples(self.run_dir, iteration, groups, kind, alpha))

    def save_point(self, last: bool = False, always: bool = False) -> None:
        """Between two steps: saves where it is time to, or the run is asked to end. A collective of all ranks.

        Args:
            last: nothing is trained after this.
            always: saves in any case.

        Raises:
            Interrupted: on every rank, when the run was asked to end; it has been saved.
        """
        saving, state = self._checkpointer, self.state
        best = self.writer is not None and saving.best(state.score)
        interrupted, due, failed, best = self.interruption.agreed(saving.due(state.step), saving.failed, best)
        if interrupted or always or best or (self._at_end if last else due):
            self.save()
        if interrupted or last or failed:
            saving.finish()
        if interrupted:
            raise Interrupted(self.interruption.reason)

    @contextlib.contextmanager
    def saved_if_interrupted(self) -> Iterator[None]:
        """Around work that ends with Interrupted where the run is asked to end: the state is saved as it was before."""
        try:
            yield
        except Interrupted:
            if self.state.step:  # before, there is nothing to go on with, and the optimizer has no state to be read
                self.save()
            self._checkpointer.finish()
            raise

    def save(self) -> None:
        """Writes a checkpoint, or begins to. A collective of all ranks."""
        state = {"files": line_file_sizes(self.run_dir), "state": self.state.as_json()} if self.writer else {}
        self._checkpointer.save(self.strategy, self.state.step, self.state.score, state)

    def restore(self, path: Path) -> None:
        """Takes state and random states from the checkpoint whose weights have been loaded; the files of a run that
        goes on in its own directory are cut to what they were."""
        saved = read_json(path / "state.json")
        self.state.load_json(saved["state"])
        restore_random_states(path)
        if self.writer:
            if path.resolve().is_relative_to(self.run_dir.resolve()):
                rewind(self.run_dir, saved["files"])
            self.writer.purge_after(self.state.step)
