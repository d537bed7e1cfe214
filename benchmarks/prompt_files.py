"""What a prompt file of many lines takes, beyond what a small one takes: python benchmarks/prompt_files.py [LINES]

CPU seconds and peak memory of the pass that checks the file, of the held-out split, of an epoch's order and of the
prompts of an iteration. The last line is a list of Prompt objects, which is what such a file would be in memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import facts, fresh, peak_extra
from nemo_brain.data.order import prompts_of_iteration
from nemo_brain.data.prompts import load_prompts
from nemo_brain.data.tokenizers import byte_tokenizer

TEXT = "Write a short answer to question number {}: what would you tell somebody who has never seen the sea?"


def write(path: Path, lines: int) -> None:
    with path.open("w") as file:
        for index in range(lines):
            file.write(json.dumps({"id": f"prompt-{index}", "prompt": TEXT.format(index)}) + "\n")


def measured(path: Path) -> dict[str, tuple[float, int]]:
    """CPU seconds and bytes of peak memory of each part."""
    found, kept = {}, {}

    def measure(name: str, work: Callable[[], object]) -> None:
        started = time.process_time()
        memory = peak_extra(lambda: kept.update({name: work()}))
        found[name] = (time.process_time() - started, memory)

    tokenizer = byte_tokenizer()
    options = {"tokenizer": tokenizer, "template": None, "max_prompt_tokens": 512}
    measure("check", lambda: load_prompts(path, **options).prompts)
    measure("split", lambda: kept["check"].split(1000, 0))
    train = kept["split"][0]
    measure("order and first iteration", lambda: prompts_of_iteration(train, 0, 256, 0))
    measure("another iteration", lambda: prompts_of_iteration(train, 1, 256, 0))
    some = train[:20_000]
    measure(f"{len(some)} prompts in a list", lambda: list(some))
    return found


def main() -> None:
    lines = int(sys.argv[1]) if len(sys.argv) > 1 else 3_000_000
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "prompts.jsonl"
        write(path, lines)
        print(json.dumps(facts()))
        print(f"{lines} lines, {path.stat().st_size / 2**20:.0f} MiB")
        for name, (seconds, memory) in fresh(measured, path).items():
            print(f"{name:<28} {seconds:8.2f} s {memory / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
