"""Trains two models and writes their metrics, without times, into a directory: ``make golden`` into tests/golden/."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

# Arithmetic that every x86-64 processor has, in one order, before torch is imported: with wider instructions sums are
# rounded otherwise, a draw near the boundary of two tokens falls to the other one, and another text is another run.
os.environ |= {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import conftest  # noqa: F401 (as in the tests: Megatron's CPU meaning before Megatron is imported)
from ranks import run_ranks
from toy_runs import QUIET, ROOT, composed

from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.run import run

GOLDEN = ROOT / "tests" / "golden"
TIMINGS = ("_seconds", "tokens_per_second", "peak_memory_gib")
RUNS = {
    "toy": ("toy",),
    # Prompts of its own: the quickstart's are what packages a machine has.
    "smollm2": (
        "quickstart",
        f"data.train={GOLDEN}/prompts.jsonl",
        "data.validation=null",
        "data.holdout=2",
        "trainer.max_iterations=2",
        "trainer.val_every_iterations=2",
        "model.export_to=null",
        "rollout.prompts_per_iteration=1",
        "rollout.outputs_per_prompt=4",
        "rollout.max_new_tokens=12",
        "train.global_batch_size=1",
        "validation.outputs_per_prompt=1",
    ),
}


def train(name: str, run_dir: Path) -> None:
    logging.disable(logging.WARNING)
    config, *overrides = RUNS[name]
    run(composed(config, f"run_dir={run_dir}", *QUIET, *overrides))


def main(target: Path) -> None:
    """Writes ``target``/NAME.jsonl of every run."""
    for name in RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            run_ranks(train, 1, name, Path(scratch, "run"))
            records = read_metrics(Path(scratch, "run", "metrics.jsonl"))
        kept = [{k: v for k, v in record.items() if not k.endswith(TIMINGS)} for record in records]
        (target / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
