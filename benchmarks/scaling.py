"""How the training step's cost grows with n, output length and model size, and what two ranks gain on two cores."""

from __future__ import annotations

import statistics

from benchmarks import common, models
from nemo_brain.core.packing import chunk_tokens

TITLE = "Scaling"
METHOD = """
The training step on one group in shared-prefix rows. Seconds per output would be constant if the prompt cost nothing;
with separate rows they would be constant too, at the price of prompt + output.
"""
_RANKS_TEXT = """
The same eight groups (200, 25, 8), one per micro-batch, by one process and by two, each with one thread on one of the
machine's two cores. The layouts take turns in fresh processes; ratios are of two ranks' seconds to one process's in
the same turn. Perfect would be 0.5, for the pipeline with eight micro-batches 0.5 (1 + 1/8) = 0.56. The ranks talk by
gloo over loopback.
"""
_LAYOUTS = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
}


def measure(smoke: bool) -> dict:
    sizes = ["toy"] if smoke else ["20M", "60M"]
    shapes = [(9, 4, 2), (9, 4, 4)] if smoke else _shapes()
    rows = []
    for size in sizes:
        times = common.fresh(_cost, size, shapes, 1 if smoke else 3)
        parameters, seconds = times
        for shape, values in zip(shapes, seconds, strict=True):
            group = models.groups_of(1, *shape, vocab=2)[0]
            positions = chunk_tokens(group, range(shape[2]), "shared_prefix")
            rows.append(
                {
                    "model": f"{size} ({parameters / 1e6:.1f}M)",
                    "shape": shape,
                    "positions": positions,
                    "seconds": common.spread(values),
                    "per_output": statistics.median(values) / shape[2],
                    "rate": 6 * parameters * positions / statistics.median(values) / 1e9,
                }
            )
    cost = {
        "title": "Cost of an output",
        "columns": [
            ("model", "model", "text"),
            ("shape", "(prompt, output, n)", "text"),
            ("positions", "positions", "count"),
            ("seconds", "seconds per step", "seconds"),
            ("per_output", "seconds per output", "number"),
            ("rate", "GFLOP/s, as 6 x parameters x positions", "number"),
        ],
        "rows": rows,
    }
    return {"parts": [cost, _ranks("toy" if smoke else "20M", smoke)], "targets": []}


def _shapes() -> list[tuple[int, int, int]]:
    return [(400, 50, n) for n in (2, 4, 8, 16, 32)] + [(400, output, 8) for output in (12, 200)]


def _ranks(size: str, smoke: bool) -> dict:
    rounds = {name: [] for name in _LAYOUTS}
    for _ in range(1 if smoke else 3):
        for name, (ranks, split) in _LAYOUTS.items():
            shape = (9, 4, 2) if smoke else (200, 25, 8)
            rounds[name].append(common.fresh(_split, size, shape, split, ranks=ranks))
    rows = [
        {
            "layout": name,
            "seconds": common.spread(values),
            "ratio": common.ratio(values, rounds["one process"]),
            "efficiency": statistics.median(rounds["one process"]) / statistics.median(values) / _LAYOUTS[name][0],
        }
        for name, values in rounds.items()
    ]
    columns = [
        ("layout", "layout", "text"),
        ("seconds", "seconds per step", "seconds"),
        ("ratio", "to one process", "ratio"),
        ("efficiency", "efficiency", "percent"),
    ]
    return {"title": f"Two ranks on two cores, {size}", "text": _RANKS_TEXT, "columns": columns, "rows": rows}


def _cost(size: str, shapes, repeats: int) -> tuple[int, list[list[float]]]:
    models.start()
    model = models.build(size)
    cases = {}
    for shape in shapes:
        groups = models.groups_of(1, *shape, model.config.vocab_size)
        cases[str(shape)] = models.brain_step(model, groups, "shared_prefix")
    cases[str(shapes[0])]()
    times = common.interleaved(cases, repeats, seconds=30, warm_up=False)
    return models.parameters_of(model), list(times.values())


def _split(size: str, shape, split: dict) -> float:
    """Seconds of a step on eight groups: the faster of two, after one to warm up."""
    models.start(**split)
    model = models.build(size)
    groups = models.groups_of(8, *shape, model.weights.vocab_size)
    budget = chunk_tokens(groups[0], range(shape[2]), "shared_prefix")
    step = models.brain_step(model, groups, "shared_prefix", budget)
    step()
    return min(common.seconds_of(step) for _ in range(2))
