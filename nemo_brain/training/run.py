"""A training from its configuration to its end, whatever its kind: run directory, resuming, status, report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback
from nemo.collections.llm.gpt.model.base import GPTModel
from omegaconf import DictConfig, OmegaConf

from nemo_brain.config.common import TrainingConfig
from nemo_brain.convert.hub import check_push, push
from nemo_brain.core.interruption import Interrupted, Interruption
from nemo_brain.core.ranks import is_first_rank, on_all_ranks, on_first_rank
from nemo_brain.durability.checkpoint import read_json
from nemo_brain.durability.resume import candidates, check_configuration
from nemo_brain.durability.supervision import Supervisor
from nemo_brain.host.distributed import connect
from nemo_brain.report.metrics import MetricsWriter, read_metrics
from nemo_brain.report.model_card import model_card
from nemo_brain.report.page import write_report
from nemo_brain.report.run_dir import locked, prepare_run_dir, write_status
from nemo_brain.report.summary import summary_lines
from nemo_brain.training.build import (
    begin_logging,
    check_schedule,
    make_loggers,
    make_trainer,
    reduce_log_noise,
    world_size,
)
from nemo_brain.training.callbacks import Driver
from nemo_brain.training.frame import AnyState, Frame, Loop
from nemo_brain.training.strategy import PackedStrategy

Model = TypeVar("Model", bound=GPTModel)


@dataclass(frozen=True)
class Parts(Generic[Model, AnyState]):
    """What a kind of training consists of, read and checked before anything is written.

    steps: optimizer steps from the first to the last. data: sizes and checksums of what is trained on, which a run that
    goes on must find again. loop: makes the loop in a frame. at_end: writes exports, on all ranks, when training ends.
    """

    model: Model
    strategy: PackedStrategy
    state: AnyState
    steps: int
    data: Mapping[str, Any]
    loop: Callable[[Frame[AnyState]], Loop]
    at_end: Callable[[], None]


def train(
    kind: str,
    cfg: DictConfig,
    config: TrainingConfig,
    make: Callable[[], Parts[Model, AnyState]],
    callbacks: Sequence[pl.Callback] = (),
) -> Model:
    """Trains, and leaves the results in ``run_dir``.

    Args:
        kind: of training, which its checkpoints name.
        cfg: the composed Hydra configuration, as it is written to the run directory.
        config: the same, checked.
        make: reads data and weights.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
        Interrupted: on every rank, when the run was asked to end early; it has been saved.
    """
    reduce_log_noise()
    world_size(config.trainer, config.model)
    # Longer than the supervisor waits, which has more to say.
    connect(config.trainer.hang_timeout_minutes + 2)
    parts = on_all_ranks(make)
    check_schedule(parts.model.optim, parts.steps)
    pushed = config.model.push_to
    if pushed is not None:
        on_first_rank(lambda: check_push(pushed))
    run_dir = Path(config.run_dir)
    record: dict[str, Any] = {"kind": kind, "configuration": dataclasses.asdict(config), "data": dict(parts.data)}
    with contextlib.ExitStack() as stack:

        def begin() -> list[Path]:
            stack.enter_context(locked(run_dir))
            return _begin(cfg, config, parts.steps, record)

        strategy = parts.strategy
        strategy.resume_candidates = earlier = on_first_rank(begin)
        interruption = Interruption(config.trainer.stop_after_minutes)
        loggers = make_loggers(config.logger, run_dir)
        begun = on_all_ranks(lambda: begin_logging(config, loggers, run_dir) if is_first_rank() else [])
        writer = MetricsWriter(run_dir, begun, config.trainer.log_every_steps) if is_first_rank() else None
        frame = Frame(
            strategy,
            parts.state,
            config.checkpoint,
            run_dir,
            writer,
            interruption,
            config.train.on_nonfinite,
            record,
        )
        driver = Driver(frame, parts.loop(frame))
        all_callbacks = [
            Supervisor(config.trainer.hang_timeout_minutes, run_dir, interruption),
            *callbacks,
            driver,  # goes on to the next step, so the others come first
            # Not after fit: with CUDA, Lightning has moved the weights to the host by then.
            LambdaCallback(on_train_end=lambda *_: parts.at_end()),
        ]
        trainer = make_trainer(
            config.trainer, loggers, strategy, parts.steps, all_callbacks, config.trainer.log_every_steps
        )
        with ending_recorded(writer, run_dir, lambda: frame.state.step):
            trainer.fit(parts.model, train_dataloaders=driver, ckpt_path=str(earlier[0]) if earlier else None)
        if is_first_rank():
            report = write_report(run_dir)
            print("\n".join(summary_lines(read_metrics(run_dir / "metrics.jsonl"), record["configuration"], report)))
        if pushed is not None:
            interruption.ignore()  # the training has ended
            on_first_rank(lambda: _push(pushed, kind, run_dir, record["configuration"]), interruption=interruption)
    return parts.model


def _push(repository: str, kind: str, run_dir: Path, configuration: Mapping[str, Any]) -> None:
    card = model_card(kind, repository, read_metrics(run_dir / "metrics.jsonl"), configuration)
    push(repository, Path(configuration["model"]["export_to"]), card)


def _begin(cfg: DictConfig, config: TrainingConfig, steps: int, record: Mapping[str, Any]) -> list[Path]:
    """Decides whether the run goes on from a checkpoint, and prepares its directory. For rank 0.

    Returns:
        The checkpoints to go on from, the best first; [] for a new run.

    Raises:
        ValueError: the checkpoints belong to another kind of training, configuration or data; ``run_dir`` cannot be
            written.
    """
    run_dir = Path(config.run_dir)
    earlier = candidates(run_dir, config.checkpoint.resume, steps)
    changes: list[str] = []
    if earlier:
        _check_record(earlier[0], record)
        changes = check_configuration(config, earlier[0], record["configuration"])
    here = bool(earlier) and earlier[0].parent.parent.resolve() == run_dir.resolve()
    prepare_run_dir(run_dir, resume=here)
    if earlier:
        print("\n  ".join([f"resuming from {earlier[0]}", *changes]))
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    return earlier


def _check_record(path: Path, record: Mapping[str, Any]) -> None:
    """ValueError where the checkpoint's training is of another kind, or has other data."""
    try:
        before = read_json(path / "run.json")
        kind, data = before["kind"], before["data"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint.resume: {path}/run.json cannot be read: {error}") from error
    remedy = "name another one, or start anew with checkpoint.resume=never"
    if kind != record["kind"]:
        raise ValueError(f"checkpoint.resume: {path} is of another kind of training ({kind}): {remedy}")
    for name, now in record["data"].items():
        if data.get(name) != now:
            raise ValueError(
                f"checkpoint.resume: {path} was written by a run on other data ({name}: {data.get(name)} -> {now}): "
                f"give it the files that it had, {remedy}"
            )


@contextlib.contextmanager
def ending_recorded(writer: MetricsWriter | None, run_dir: Path, steps: Callable[[], int]) -> Iterator[None]:
    """Around a training or an evaluation, which says itself when it begins: rank 0 writes to status.json how it ends.

    Args:
        writer: of rank 0; None on the others.
        steps: tells the optimizer steps made.
    """
    state = "running"
    try:
        yield
        state = "finished"
    except Interrupted:
        state = "interrupted"
        raise
    finally:
        if writer:
            state = "failed" if state == "running" else state
            with contextlib.suppress(OSError):  # a full disk has ended the run with an error of its own
                write_status(run_dir, state, steps())
            writer.finish(state)
