"""Measures the tables that are named, or all of them, and rewrites docs/benchmarks.md.

python benchmarks/run.py step            # one table
python benchmarks/run.py all             # every table, in about an hour
python benchmarks/run.py page            # only the page, from the results that are there
python benchmarks/run.py step --profile  # also where the time goes, operation by operation
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
TABLES = ("step", "layouts", "trl", "logprobs", "sampling", "engines", "guards", "checkpoints", "scaling", "calculated")
_MODULES = {"trl": "against_trl"}  # a module named trl would hide the library


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all", "page"])
    parser.add_argument("--profile", action="store_true", help="also profile what the table compares")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: whether it runs, not how fast")
    parser.add_argument("--results", type=Path, help="for results and page (benchmarks/results and docs; build/smoke)")
    options = parser.parse_args(arguments)
    tables = [t for t in TABLES if t in options.tables or "all" in options.tables]
    failed = []
    if tables:
        prepare()
    from benchmarks.page import places, write_page

    results, page = places(options.results, options.smoke)
    results.mkdir(parents=True, exist_ok=True)
    for table in tables:
        try:
            measure(table, results, options.smoke, options.profile)
        except Exception:
            traceback.print_exc()
            failed.append(table)
    write_page(results, page)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def measure(table: str, results: Path, smoke: bool, profile: bool) -> None:
    """Writes ``results``/TABLE.json; a profile goes to TABLE.profile.json, and stays there when the table is measured
    again without."""
    from benchmarks import common

    module = importlib.import_module(f"benchmarks.{_MODULES.get(table, table)}")
    print(f"{table} ...", flush=True)
    started = time.perf_counter()
    result = {"facts": common.facts(), **module.measure(smoke)}
    result |= {"table": table, "title": module.TITLE, "method": module.METHOD.strip() + "\n", "smoke": smoke}
    result["measured_in_seconds"] = round(time.perf_counter() - started)
    _write(results / f"{table}.json", result)
    print(f"{table}: {result['measured_in_seconds']} s", flush=True)
    if profile and hasattr(module, "profile"):
        profiled = {"facts": common.facts(), "profiles": module.profile(smoke)}
        _write(results / f"{table}.profile.json", profiled)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare() -> None:
    """Megatron's CPU meaning before anything imports Megatron, and silence."""
    import torch

    from nemo_brain.host import cpu

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cpu.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
