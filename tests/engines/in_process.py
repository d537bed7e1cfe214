"""Runs ``InProcessEngine`` of a real vLLM as a training process does, and writes what it samples: in its environment.

    python in_process.py DIRECTORY RESULT TOKENS WEIGHTS...

DIRECTORY: config.json and the tokenizer; WEIGHTS: safetensors files, each of a policy, which are loaded one after the
other; before each the same outputs are sampled from the one before it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nemo_brain.sampling.in_process import InProcessEngine


def main(directory: str, result: str, tokens: str, *weights: str) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29511")
    dist.init_process_group("gloo")
    engine = InProcessEngine(
        Path(directory),
        dtype=torch.float32,
        ranks=1,
        context=256,
        rows=8,
        memory=0.4,
        options={"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False},
    )
    prompt = json.loads(tokens)
    parameters = {"temperature": 0.7, "max_tokens": 12, "detokenize": False, "ignore_eos": True}
    found = []
    for path in weights:
        started = time.perf_counter()
        engine.load(load_file(path).items())
        seconds = time.perf_counter() - started
        choices = dict(engine.generate([(prompt, seed) for seed in range(8)], parameters))
        engine.sleep()
        found.append({"seconds": seconds, "choices": [choices[i] for i in range(8)]})
    asked = iter([False, True])
    left = list(engine.generate([(prompt, 0)] * 2, parameters | {"max_tokens": 200}, lambda: next(asked)))
    again = dict(engine.generate([(prompt, seed) for seed in range(8)], parameters))
    Path(result).write_text(
        json.dumps({"policies": found, "stopped": len(left), "again": [again[i] for i in range(8)]})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
