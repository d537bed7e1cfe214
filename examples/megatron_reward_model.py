"""Trains a Megatron reward model on preference pairs.

    python examples/megatron_reward_model.py data.train=preferences.jsonl         # conf/reward_model.yaml
    torchrun --nproc-per-node 4 examples/megatron_reward_model.py data.train=preferences.jsonl \
        model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path


def main() -> None:
    # Megatron's checkpoint writer starts processes that import this file: the heavy imports are theirs to skip.
    from nemo_brain import cpu

    cpu.enable()

    from nemo.core.config import hydra_runner

    from nemo_brain.reward_run import train_reward_model

    def train(cfg) -> None:
        try:
            train_reward_model(cfg)
        except ValueError as error:
            # Ours name the key or the line and the remedy, and need no traceback. Those of libraries keep theirs.
            *_, last = traceback.walk_tb(error.__traceback__)
            if not last[0].f_globals["__name__"].startswith("nemo_brain."):
                raise
            sys.exit(f"error: {error}")

    hydra_runner(config_path=str(Path(__file__).resolve().parent.parent / "conf"), config_name="reward_model")(train)()


if __name__ == "__main__":
    main()
