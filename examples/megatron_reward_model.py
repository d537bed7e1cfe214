"""Trains a Megatron reward model on preference pairs.

    python examples/megatron_reward_model.py data.train=preferences.jsonl         # conf/reward_model.yaml
    torchrun --nproc-per-node 4 examples/megatron_reward_model.py data.train=preferences.jsonl \
        model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2

The same as ``nemo-brain reward-model``.
"""

import sys

from nemo_brain.cli.main import main

if __name__ == "__main__":
    main(["reward-model", *sys.argv[1:]])
