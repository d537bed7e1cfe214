"""Large models on H100s, by the arithmetic of ``nemo-brain estimate``. Calculated, not measured."""

from __future__ import annotations

import dataclasses

from nemo_brain.cli.cost import CARDS, MODELS, SOURCES, Plan, Rates, Work, best, memory, peak, seconds

TITLE = "Large models on H100s: calculated, not measured"
METHOD = """
**Nothing in this section was measured.** It is the arithmetic of `nemo-brain estimate` (`nemo_brain/cli/cost.py`, whose
formulas `tests/cli/test_cost.py` checks against numbers computed by hand), with the rates below: some are what one H100
showed, the others are assumptions.
"""
_GPUS = {"llama-8b": (8, 32, 128, 512), "llama-70b": (32, 128, 512)}


def measure(smoke: bool) -> dict:
    """The section's tables; nothing is measured, so ``smoke`` changes nothing."""
    card, rates, work = CARDS["h100"], Rates(), Work()
    sizes, times = [], []
    for name, counts in _GPUS.items():
        model = MODELS[name]
        for gpus in counts:
            plan = best(model, work, gpus, card, rates)[0]
            where = {"model": name, "gpus": gpus, "split": f"{plan.tensor} x {plan.pipeline} x {plan.data}"}
            held = memory(model, work, plan, rates)
            kept = ", ".join(
                [*(["prior offloaded"] if plan.prior == "offload" else []), *(["recompute"] if plan.recompute else [])]
            )
            sizes.append({**where, **held, "peak": peak(held), "kept": kept or "all"})
            parts = seconds(model, work, plan, card, rates)
            whole = sum(parts.values())
            separate = sum(seconds(model, work, dataclasses.replace(plan, shared=False), card, rates).values())
            rate = work.groups * work.n * work.output / whole / gpus
            times.append({**where, **parts, "total": whole, "rate": rate, "separate": separate / whole})
    known = [
        {"name": item.name, "value": getattr(rates, item.name), "unit": unit, "source": source}
        for item in dataclasses.fields(Rates)
        for unit, source in [SOURCES[item.name]]
    ]
    split = [("model", "model", "text"), ("gpus", "GPUs", "count"), ("split", "TP x PP x DP", "text")]
    columns = [(name, name, "bytes") for name in memory(MODELS["llama-8b"], work, Plan(), rates)]
    columns += [("peak", "most at a time", "bytes"), ("kept", "kept", "text")]
    parts = [(name, f"{name}, s", "number") for name in ("sampling", "scoring", "training")]
    parts += [("total", "iteration, s", "number"), ("rate", "output tokens/s per GPU", "number")]
    parts += [("separate", "separate rows / this", "ratio")]
    text = f"""
An iteration: {work.groups} groups of {work.n} outputs, prompts of {work.prompt} and outputs of {work.output} tokens,
{work.batch} groups per optimizer step, one pass over them, at most {work.rows_in_flight} rows in flight per
replica; the quickest layout that fits. bf16 weights, fp32 gradients, distributed Adam with fp32 master weights,
sequence parallelism. Rewards are not counted.
"""
    return {
        "parts": [
            {
                "title": "Rates",
                "columns": [
                    ("name", "name", "text"), ("value", "value", "number"), ("unit", "unit", "text"),
                    ("source", "source", "text"),
                ],
                "rows": known,
            },
            {"title": "Memory per GPU", "text": text, "columns": [*split, *columns], "rows": sizes},
            {"title": "Seconds per iteration", "columns": [*split, *parts], "rows": times},
        ],
        "targets": [],
    }  # fmt: skip
