"""The page's section of one card: what was measured (``gpu.py``), beside what the first run on a card gave and the
targets. Where nothing was measured the column is empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nemo_brain.cli.cost import CARDS

TITLE = "One GPU"
METHOD = """
A random Llama of Llama-3.2-1B's shape (1.24e9 parameters, 16 layers, 2048 wide, 32/8 heads, vocabulary 128,256), bf16
with fp32 master weights, no recompute, one process, one card. Without Transformer Engine (hidden where it is
installed), and with it in the rows that say so. Every call is waited for (`torch.cuda.synchronize`), warmed up once,
and cases of one part take turns. A step is written as groups x (prompt, output, n). FLOP/s of a step count 6 x the
layers' parameters x positions + 6 x the output layer's x targets; of the output layer 6 x positions x width x
vocabulary. Extra memory is the peak that torch's allocator counts beyond what was there before the call.

The column "first run" is of an earlier version (7662432) on one H100 80GB, 2026-11-26, torch 2.11, no Transformer
Engine. What a step waits for are its stream, event and device synchronisations; the profiler's own last one is among
them, and in the difference between two numbers of micro-batches it is not.
"""
_UNMEASURED = """
**Not measured in this version: no card was at hand.** The column stays empty until `python benchmarks/gpu.py` has run
on one. What stands for it meanwhile are tests that count on a CPU what a card would have to do ([gpu.md](gpu.md)).
"""
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "output layer": [
        ("case", "forward and backward", "text"),
        ("seconds", "seconds", "seconds"),
        ("tflops", "TFLOP/s", "number"),
        ("memory", "extra memory", "bytes"),
    ],
    "attention": [
        ("shape", "groups x (prompt, output, n)", "text"),
        ("kernel", "kernel", "text"),
        ("seconds", "seconds", "seconds"),
        ("memory", "extra memory", "bytes"),
        ("bytes_per_position", "bytes per position", "number"),
    ],
    "drawing": [
        ("rows", "rows", "count"),
        ("case", "by", "text"),
        ("seconds", "seconds", "seconds"),
        ("memory", "extra memory", "bytes"),
    ],
    "step": [
        ("engine", "layers of", "text"),
        ("shape", "groups x (prompt, output, n)", "text"),
        ("layout", "layout", "text"),
        ("positions", "positions", "count"),
        ("seconds", "seconds", "seconds"),
        ("positions_per_second", "positions/s", "number"),
        ("share", "of the card's FLOP/s", "percent"),
        ("ratio", "shared / separate", "ratio"),
        ("memory", "extra memory", "bytes"),
        ("bytes_per_position", "bytes per position of a micro-batch", "number"),
    ],
    "nemo": [
        ("engine", "layers of", "text"),
        ("step", "step", "text"),
        ("positions", "positions", "count"),
        ("seconds", "seconds", "seconds"),
        ("ratio", "BRAIn / this", "ratio"),
        ("memory", "extra memory", "bytes"),
    ],
    "launches": [
        ("engine", "layers of", "text"),
        ("of", "of", "text"),
        ("micro_batches", "micro-batches", "count"),
        ("launches", "launches", "number"),
        ("waits", "waits", "number"),
        ("device_seconds", "seconds on the card", "number"),
        ("longest", "longest", "text"),
    ],
    "sampling": [
        ("rows", "rows", "count"),
        ("n", "n", "count"),
        ("prompt", "prompt tokens", "count"),
        ("new", "new tokens", "count"),
        ("by", "by", "text"),
        ("rate", "tokens/s", "rate"),
        ("seconds_per_token", "seconds per token of all rows", "number"),
        ("ratio", "ours / this", "ratio"),
        ("memory", "extra memory", "bytes"),
    ],
}
_TITLES = {
    "output layer": "Output layer, [4096 x 2048] x 128,256",
    "attention": "Attention of one layer, forward and backward",
    "drawing": "Drawing from 128,256 tokens",
    "step": "Training step",
    "nemo": "Training step, against NeMo's",
    "launches": "Launches and waits",
    "sampling": "Sampling",
}


def section(results: Path) -> dict:
    """What ``page.py`` takes of a table, from ``results``/gpu.json or from nothing."""
    file = results / "gpu.json"
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"parts": {}, "smoke": False}
    facts = measured.get("facts")
    parts = {name: part["rows"] for name, part in measured["parts"].items()}
    card = str(facts["card"]).lower() if facts else ""
    peak = next((sheet.flops for name, sheet in CARDS.items() if name.split("-")[0] in card), None)
    counted = {} if measured["smoke"] else parts
    text = _UNMEASURED if facts is None else f"{facts['date']}, {facts['card']}; {_versions(facts)}."
    tables = [{"title": "Targets", "text": text, **_targets(counted, peak), "on_page": True}]
    for name, columns in COLUMNS.items():
        rows = [row for part, found in parts.items() if table_of(part) == name for row in found]
        if rows:
            rows = [{**row, "share": row["flops"] / peak if "flops" in row and peak else None} for row in rows]
            tables.append({"title": _TITLES[name], "columns": columns, "rows": rows})
    missing = [f"{name}: {_why(part)}" for name, part in measured["parts"].items() if _why(part)]
    return {
        "title": TITLE,
        "method": METHOD.strip() + "\n" + "".join(f"\nNot complete: {text}.\n" for text in missing),
        "parts": tables,
        "facts": facts,
        "smoke": measured["smoke"],
        "command": "python benchmarks/gpu.py",
        "measured_in_seconds": round(sum(part.get("seconds", 0) for part in measured["parts"].values())),
    }


def _versions(facts: dict) -> str:
    return ", ".join(f"{package} {version}" for package, version in facts["versions"].items())


def table_of(part: str) -> str:
    """Which of the tables has the part's rows."""
    return "sampling" if part == "vllm" else part.split(",")[0]


def _why(part: dict) -> str | None:
    return part["error"].strip().splitlines()[-1] if "error" in part else part.get("left_out")


def _targets(parts: dict[str, list[dict]], peak: float | None) -> dict:
    """The table of targets: what was aimed at on one H100, and what of it was measured."""
    first = "8 x (400, 50, 8)"

    def value(part: str, key: str, **where: object) -> float | None:
        for row in parts.get(part, []):
            if all(row.get(name) == wanted for name, wanted in where.items()):
                found = row[key]
                return found["median"] if isinstance(found, dict) else found
        return None

    def shared(key: str, shape: str) -> float | None:
        return value("step", key, shape=shape, layout="shared_prefix")

    flops = shared("flops", "64 x (400, 50, 8)")
    waits = value("launches", "waits", of="each further micro-batch")
    rows = [
        _row(f"step, {first}, shared prefix", "0.286 s", shared("seconds", first), "at most", 0.115, "{:.3f} s"),
        _row(
            "step, 64 x (400, 50, 8): of the card's FLOP/s",
            "",
            None if flops is None or peak is None else flops / peak,
            "at least",
            0.45,
            "{:.0%}",
        ),
        *(
            _row(f"shared / separate, {shape}", before, shared("ratio", shape), "at most", bound, "{:.2f}")
            for shape, before, bound in (
                (first, "0.50", 0.28),
                ("8 x (512, 512, 8)", "0.95", 0.62),
                ("16 x (128, 128, 8)", "1.10", 0.62),
            )
        ),
        _row("BRAIn's step / NeMo's", "1.32", value("nemo", "ratio", step="NeMo"), "at most", 1.05, "{:.2f}"),
        _row(
            "output layer, forward and backward",
            "88 TFLOP/s",
            value("output layer", "tflops", case="ours"),
            "at least",
            350,
            "{:.0f} TFLOP/s",
        ),
        _row(
            "output layer, extra memory",
            "0.57 GiB",
            _over(value("output layer", "memory", case="ours"), 2**30),
            "at most",
            1.5,
            "{:.2f} GiB",
        ),
        _row(
            "sampling, 256 rows, prompts of 400, n = 8",
            "6,341 tokens/s",
            value("sampling", "rate", by="ours", rows=256),
            "at least",
            60000,
            "{:,.0f} tokens/s",
        ),
        _row(
            "drawing 256 rows",
            "6.4 ms",
            _over(value("drawing", "seconds", case="ours"), 1e-3),
            "at most",
            0.3,
            "{:.2f} ms",
        ),
        _row("waits per micro-batch", "106 per step", waits, "at most", 0, "{:.1f}"),
    ]
    columns = [(name, name, "text") for name in ("figure", "first run", "target", "measured", "met")]
    return {"columns": columns, "rows": rows}


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _row(figure: str, before: str, value: float | None, bound: str, target: float, form: str) -> dict[str, str]:
    met: Callable[[float], bool] = (lambda v: v <= target) if bound == "at most" else (lambda v: v >= target)
    return {
        "figure": figure,
        "first run": before,
        "target": f"{bound} {form.format(target)}",
        "measured": "" if value is None else form.format(value),
        "met": "" if value is None else "yes" if met(value) else "**no**",
    }
