"""Shared-prefix rows against separate rows: the training step's time, tokens and memory."""

from __future__ import annotations

import statistics

from benchmarks import common, models
from nemo_brain.core.packing import LAYOUTS, chunk_tokens

TITLE = "One row per group, against one row per output"
METHOD = """
The whole training step (forward, backward, clipping, Adam) on one group, fp32, no recompute; each layout has the
group in one micro-batch and takes the one-pass route. Separate rows here are packed without padding, and have logits
at the outputs' positions only: padded rows with all logits would be slower still. The ideal is the ratio of
positions. Memory: the peak beyond weights, gradient buffers and optimizer state.
The optimizer's time is per step, not per group: a step of one group, as here, makes the most of it, so that the ratio
is given without it too.

Four times as many outputs in separate rows are four times as many rows: for the real model at n = 32 they are not
measured but stated as four times the figures at n = 8 (marked ~), which errs in their favour by the optimizer's time.
"""
TARGET = 0.25
TARGET_SHAPE = (400, 50, 8)
SHAPES = [(50, 12, 8), (128, 128, 8), TARGET_SHAPE, (400, 50, 32)]


def measure(smoke: bool) -> dict:
    sizes = ["toy"] if smoke else ["20M", "60M", models.SMOLLM2]
    shapes = [(20, 4, 8)] if smoke else SHAPES
    rows, targets = [], []
    for size in sizes:
        measured = {}
        for shape in shapes:
            large = size == models.SMOLLM2
            scaled = large and shape[2] == 32
            layouts = ("shared_prefix",) if scaled else LAYOUTS
            seconds = (240 if large else 90) if shape == TARGET_SHAPE else 25
            timed = common.fresh(_timed, size, shape, layouts, 1 if smoke else 5, seconds)
            times, tokens, memory = timed["times"], timed["tokens"], timed["memory"]
            row = {"model": size, "shape": shape, **{f"tokens_{name}": tokens[name] for name in LAYOUTS}}
            row["ideal"] = tokens["shared_prefix"] / tokens["separate_rows"]
            row |= {f"seconds_{name}": common.spread(times[name]) for name in layouts}
            row |= {f"memory_{name}": memory[name] for name in layouts}
            if scaled:
                eighth = measured[TARGET_SHAPE]
                row["time"] = row["seconds_shared_prefix"]["median"] / (4 * eighth["seconds_separate_rows"]["median"])
                row["ratio"] = f"~{row['time']:.3g}"
                row["memory_ratio"] = f"~{memory['shared_prefix'] / (4 * eighth['memory_separate_rows']):.3g}"
            else:
                row["ratio"] = common.ratio(times["shared_prefix"], times["separate_rows"])
                passes = {name: [s - timed["optimizer"] for s in values] for name, values in times.items()}
                row["passes"] = common.ratio(passes["shared_prefix"], passes["separate_rows"])
                row["memory_ratio"] = memory["shared_prefix"] / memory["separate_rows"]
            measured[shape] = row
            rows.append(row)
            if shape == TARGET_SHAPE or smoke:
                what = f"shared prefix / separate rows, {size}, {shape}"
                targets.append({"what": what, "value": row["ratio"], "at_most": TARGET})
    columns = [("model", "model", "text"), ("shape", "(prompt, output, n)", "text")]
    for key, label, unit in (
        ("tokens", "positions", "count"),
        ("seconds", "s", "seconds"),
        ("memory", "peak", "bytes"),
    ):
        columns += [(f"{key}_{name}", f"{label}, {name.replace('_', ' ')}", unit) for name in LAYOUTS]
    columns += [("ideal", "ratio of positions", "ratio"), ("ratio", "ratio of times", "ratio")]
    columns += [("passes", "without the optimizer", "ratio")]
    columns += [("memory_ratio", "ratio of memory", "ratio")]
    return {"parts": [{"columns": columns, "rows": rows}], "targets": targets}


def profile(smoke: bool) -> list[dict]:
    """torch.profiler on a step of each layout."""
    size, shape = ("toy", (20, 4, 8)) if smoke else ("20M", TARGET_SHAPE)
    return [
        {"title": f"{layout}, {size}, {shape}", "operations": common.fresh(_operations, size, shape, layout)}
        for layout in LAYOUTS
    ]


def _group(size: str, shape: tuple[int, int, int]):
    prompt, output, n = shape
    return models.groups_of(1, prompt, output, n, models.weights_of(size).vocab_size)


def _timed(size: str, shape, layouts, repeats: int, seconds: float) -> dict:
    models.start()
    groups = _group(size, shape)
    model = models.build(size)
    cases = {layout: common.Meter(models.brain_step(model, groups, layout)) for layout in layouts}
    # Warm with a small group: the optimizer's state exists then, and a large step is not wasted.
    models.brain_step(model, _group(size, (8, 4, 2)), layouts[0])()
    tokens = {layout: chunk_tokens(groups[0], range(shape[2]), layout) for layout in LAYOUTS}
    times = common.interleaved(cases, repeats, seconds, warm_up=size == "20M")
    # Clipping and optimizer cost the same in both, once per step however many groups it has.
    optimizer = statistics.median(common.seconds_of(model.optimizer.step) for _ in range(3))
    memory = {layout: meter.peak for layout, meter in cases.items()}
    return {"times": times, "tokens": tokens, "memory": memory, "optimizer": optimizer}


def _operations(size: str, shape, layout: str) -> list[dict]:
    models.start()
    step = models.brain_step(models.build(size), _group(size, shape), layout)
    step()
    return common.top_operations(step)
