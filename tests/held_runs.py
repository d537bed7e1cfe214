"""Runs of the toy that wait at a known place until something has been done to them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

HELD = """
import time
from pathlib import Path
from nemo_brain.rewards.toy import letter_fraction

def held(prompts, outputs, **options):
    while Path({step!r}).exists() and not Path({go!r}).exists():
        time.sleep(0.02)
    return letter_fraction(prompts, outputs, **options)
"""


class Hold:
    """A run's reward that waits after step 8, the end of the second of three iterations, until ``release``.

    What is done to the run meanwhile is done before its end, however slow or fast this machine is.
    """

    def __init__(self, directory: Path):
        self._step, self._go = directory / "run" / "checkpoints" / "step_000000008", directory / "go"
        file = directory / "held.py"
        file.write_text(HELD.format(step=str(self._step), go=str(self._go)))
        self.overrides = [f"reward.function={file}:held", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]

    @property
    def reached(self) -> bool:
        return self._step.exists()

    def await_by(self, process: subprocess.Popen) -> None:
        while not self.reached:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)

    def release(self) -> None:
        self._go.touch()
