"""Trains a Megatron GPT with BRAIn.

    python examples/megatron_brain.py                                       # conf/brain.yaml, one process
    python examples/megatron_brain.py --config-name toy seed=1
    torchrun --nproc-per-node 4 examples/megatron_brain.py --config-name toy \
        model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2
"""

from __future__ import annotations

import gc
from pathlib import Path

from nemo_brain.core import signals


def main() -> None:
    signals.listen()  # what follows takes long
    gc.disable()  # while objects come by the hundred thousand, to stay; launch enables it again
    # Megatron's checkpoint writer starts processes that import this file: the heavy imports are theirs to skip.
    from nemo_brain.host import cpu

    cpu.enable()

    from nemo_brain.training.brain.run import run
    from nemo_brain.training.entry import launch

    launch(Path(__file__).resolve().parent.parent / "conf", "brain", run)


if __name__ == "__main__":
    main()
