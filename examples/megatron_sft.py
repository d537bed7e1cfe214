"""Fine-tunes a Megatron GPT on prompts with completions, and on conversations.

    python examples/megatron_sft.py data.train=demonstrations.jsonl         # conf/sft.yaml
    torchrun --nproc-per-node 4 examples/megatron_sft.py data.train=demonstrations.jsonl \
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

    from nemo_brain.training.entry import launch
    from nemo_brain.training.sft.run import fine_tune

    launch(Path(__file__).resolve().parent.parent / "conf", "sft", fine_tune)


if __name__ == "__main__":
    main()
