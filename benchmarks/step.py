"""BRAIn's training step against NeMo's own language-model step on the same number of row positions."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron.core.pipeline_parallel import schedules

from benchmarks import common, models
from nemo_brain.core.packing import Chunk, chunk_tokens, pack
from nemo_brain.model import passes as scoring
from nemo_brain.training.brain import passes

TITLE = "One training step, against NeMo's own"
METHOD = """
Both steps: gradient buffers zeroed, forward and backward through Megatron's schedule, gradient checks, clipping,
Adam. fp32, the same weights, one group per micro-batch, two micro-batches (SmolLM2: one). BRAIn's step takes the
one-pass route over shared-prefix rows, and includes planning, packing, the objective and its coefficients.

NeMo's step is NeMo's data step, forward step and MaskedTokenLossReduction over rows of as many positions: plain
causal attention over the whole row, and logits and a loss at every position. BRAIn needs logits at the outputs'
positions only; in the shape with a prompt of one token these are all positions. Megatron's own attention without
Transformer Engine is a product, a mask and a softmax, ours is torch's fused attention; the second comparison gives
NeMo's step the fused kernel too, and is the one that the target is set for.

Memory: the peak beyond weights, gradient buffers and optimizer state, in a fresh process.
"""
TARGET = 1.05
SHAPES = [(400, 50, 8), (1, 200, 4)]
CASES = {"ours": "BRAIn", "nemo": "NeMo", "fused": "NeMo, fused attention"}


def measure(smoke: bool) -> dict:
    sizes = ["toy"] if smoke else ["20M", models.SMOLLM2]
    shapes = [(9, 4, 2)] if smoke else SHAPES
    rows, targets, shares = [], [], []
    for size in sizes:
        large = size == models.SMOLLM2
        for shape in shapes[:1] if large else shapes:
            timed = common.fresh(_timed, size, shape, repeats=1 if smoke else 5, seconds=240 if large else 40)
            for name, label in CASES.items():
                rows.append(
                    {
                        "model": size,
                        "shape": shape,
                        "positions": timed["positions"],
                        "step": label,
                        "seconds": common.spread(timed["times"][name]),
                        "ours": common.ratio(timed["times"]["ours"], timed["times"][name]),
                        "memory": common.fresh(_memory, size, shape, name, precise_memory=True),
                    }
                )
            targets.append(
                {
                    "what": f"BRAIn's step / NeMo's with fused attention, {size}, {shape}",
                    "value": common.ratio(timed["times"]["ours"], timed["times"]["fused"]),
                    "at_most": TARGET,
                }
            )
            for part, seconds in timed["parts"].items():
                shares.append(
                    {
                        "model": size,
                        "shape": shape,
                        "part": part,
                        "seconds": seconds,
                        "share": seconds / sum(timed["parts"].values()),
                    }
                )
    return {
        "parts": [
            {
                "columns": [
                    ("model", "model", "text"),
                    ("shape", "(prompt, output, n)", "text"),
                    ("positions", "positions per step", "count"),
                    ("step", "step", "text"),
                    ("seconds", "seconds", "seconds"),
                    ("ours", "BRAIn / this", "ratio"),
                    ("memory", "peak memory", "bytes"),
                ],
                "rows": rows,
            },
            {
                "title": "Where BRAIn's step spends its time",
                "columns": [
                    ("model", "model", "text"),
                    ("shape", "(prompt, output, n)", "text"),
                    ("part", "part", "text"),
                    ("seconds", "seconds", "number"),
                    ("share", "share", "percent"),
                ],
                "rows": shares,
            },
        ],
        "targets": targets,
    }


def profile(smoke: bool) -> list[dict]:
    """torch.profiler on each kind of step."""
    size, shape = ("toy", (9, 4, 2)) if smoke else ("20M", SHAPES[0])
    return [
        {"title": f"{label}, {size}, {shape}", "operations": common.fresh(_operations, size, shape, name)}
        for name, label in CASES.items()
    ]


def _case(name: str, size: str, shape: tuple[int, int, int]) -> tuple[models.Trainable, Callable[[], None], list]:
    prompt, output, n = shape
    vocab = models.weights_of(size).vocab_size
    groups = models.groups_of(1 if size == models.SMOLLM2 else 2, prompt, output, n, vocab)
    models.start()
    if name == "ours":
        model = models.build(size)
        budget = chunk_tokens(groups[0], range(n), "shared_prefix")
        return model, models.brain_step(model, groups, "shared_prefix", budget), groups
    model = models.build(size, models.nemo_config(causal_kernel=name == "fused"))
    rows = [pack(groups, [Chunk(g, tuple(range(n)))], "shared_prefix").tokens_1S for g in range(len(groups))]
    return model, models.nemo_step(model, rows), groups


def _timed(size: str, shape: tuple[int, int, int], repeats: int, seconds: float) -> dict:
    built = {name: _case(name, size, shape) for name in CASES}
    times = common.interleaved({name: step for name, (_, step, _) in built.items()}, repeats, seconds)
    model, step, groups = built["ours"]
    positions = sum(chunk_tokens(group, range(len(group.outputs)), "shared_prefix") for group in groups)
    return {"times": times, "positions": positions, "parts": _parts(model, step)}


def _parts(model: models.Trainable, step: Callable[[], None]) -> dict[str, float]:
    """Seconds of one step by what they are spent on."""
    with common.Stopwatch() as watch:
        watch.watch(scoring, "plan", "planning")
        watch.watch(scoring, "pack", "packing")
        watch.watch(passes._ObjectiveLoss, "__call__", "objective and coefficients")
        watch.watch(passes, "coefficients", "objective and coefficients")
        watch.watch(model.chunks[0], "forward", "forward")
        watch.watch(schedules, "backward_step", "backward")
        watch.watch(model.config, "finalize_model_grads_func", "gradient reduction")
        watch.watch(model.optimizer, "step", "clipping and optimizer")
        before = time.perf_counter()
        step()
        whole = time.perf_counter() - before
    return {**watch.seconds, "rest": whole - sum(watch.seconds.values())}


def _memory(size: str, shape: tuple[int, int, int], name: str) -> int:
    model, step, _ = _case(name, size, shape)
    model.step(lambda: None)  # allocates the optimizer's state
    return common.peak_extra(step)


def _operations(size: str, shape: tuple[int, int, int], name: str) -> list[dict]:
    _, step, _ = _case(name, size, shape)
    step()
    return common.top_operations(step)
