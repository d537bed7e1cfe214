"""Fine-tunes a Megatron GPT on prompts with completions, and on conversations.

    python examples/megatron_sft.py data.train=demonstrations.jsonl         # conf/sft.yaml
    torchrun --nproc-per-node 4 examples/megatron_sft.py data.train=demonstrations.jsonl \
        model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2

The same as ``nemo-brain sft``.
"""

import sys

from nemo_brain.cli.main import main

if __name__ == "__main__":
    main(["sft", *sys.argv[1:]])
