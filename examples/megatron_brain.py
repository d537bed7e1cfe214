"""Trains a Megatron GPT with BRAIn.

    python examples/megatron_brain.py                                       # conf/brain.yaml, one process
    python examples/megatron_brain.py --config-name toy seed=1
    torchrun --nproc-per-node 4 examples/megatron_brain.py --config-name toy \
        model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2

The same as ``nemo-brain train``.
"""

import sys

from nemo_brain.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
