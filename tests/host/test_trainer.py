"""Lightning's trainer goes on until it is told to stop, whatever ``max_steps`` it was made with."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from nemo_brain.host.trainer import lift_step_limit


class StopAfter(pl.Callback):
    def __init__(self, lift: bool):
        self.lift = lift

    def on_fit_start(self, trainer, module) -> None:
        if self.lift:
            lift_step_limit(trainer)

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step == 4


@pytest.mark.parametrize(("lift", "steps"), [(True, 4), (False, 2)])
def test_the_last_step_is_the_one_that_is_said_to_be(lift, steps):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=0,
        callbacks=[StopAfter(lift)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    assert trainer.global_step == steps
