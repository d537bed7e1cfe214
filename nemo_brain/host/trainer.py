"""Lightning's trainer goes on until it is told to stop."""

from __future__ import annotations

import lightning.pytorch as pl


def lift_step_limit(trainer: pl.Trainer) -> None:
    """``max_steps`` ends a training no more; ``trainer.should_stop`` does.

    NeMo's schedulers of the learning rate read from ``max_steps`` how long they are, and Lightning has no way to set it
    without the training ending there. Called once the optimizers are set up.
    """
    trainer.fit_loop.epoch_loop.max_steps = -1
