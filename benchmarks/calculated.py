"""A written model of an iteration's time and memory on H100s. Calculated, not measured: nothing here has run on a GPU.

Symbols: N parameters, L layers, h hidden size, P prompt and R output tokens, n outputs per group; t tensor-, p
pipeline-, d data-parallel size; m micro-batches per rank and step. Bytes and seconds throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

TITLE = "Large models on H100s: calculated, not measured"
METHOD = """
**Nothing in this section was measured.** It is arithmetic in `benchmarks/calculated.py`, whose formulas
`tests/test_calculated_model.py` checks against numbers computed by hand, with the constants below. Those marked as
assumption are guesses in the range that public reports give; a first run on real GPUs will correct them.
"""


@dataclass(frozen=True)
class Constants:
    """Of the machine and of how well it is used; ``metadata`` of each field in ``_SOURCES``."""

    peak_flops: float = 989e12
    hbm_bandwidth: float = 3.35e12
    hbm_bytes: float = 80e9
    nvlink: float = 450e9
    infiniband: float = 50e9
    gpus_per_node: int = 8
    matmul_efficiency: float = 0.45
    hbm_efficiency: float = 0.7
    link_efficiency: float = 0.8
    collective_latency: float = 20e-6
    decode_overhead_per_layer: float = 50e-6
    exposed_data_parallel: float = 0.5
    activation_bytes: float = 34.0


_SOURCES = {
    "peak_flops": ("FLOP/s, bf16 dense", "NVIDIA H100 SXM data sheet"),
    "hbm_bandwidth": ("bytes/s", "NVIDIA H100 SXM data sheet"),
    "hbm_bytes": ("bytes", "NVIDIA H100 SXM data sheet"),
    "nvlink": ("bytes/s per direction and GPU", "NVIDIA H100 SXM data sheet (900 GB/s both ways)"),
    "infiniband": ("bytes/s per GPU", "one 400 Gb/s port per GPU, as in NVIDIA's DGX H100"),
    "gpus_per_node": ("", "NVIDIA DGX H100"),
    "matmul_efficiency": ("of peak_flops, in training, scoring and prefill", "assumption"),
    "hbm_efficiency": ("of hbm_bandwidth, in decoding", "assumption"),
    "link_efficiency": ("of nvlink and infiniband", "assumption"),
    "collective_latency": ("s per collective or hop", "assumption"),
    "decode_overhead_per_layer": ("s, kernel launches without CUDA graphs", "assumption"),
    "exposed_data_parallel": ("of the gradients' and weights' transfer, the rest overlaps", "assumption"),
    "activation_bytes": (
        "per position, layer and hidden unit, over t",
        "Korthikanti et al. 2022 (arXiv:2205.05198), with sequence parallelism and fused attention; for a GPT-3 layer",
    ),
}


_TEXTS = [("unit", "unit", "text"), ("source", "source", "text")]


@dataclass(frozen=True)
class Model:
    """A Llama: output layer of its own, grouped-query attention, gated feed-forward layer."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def parameters(self) -> int:
        """Matrices only; norms are below 0.01%."""
        kv = 2 * self.kv_heads * self.hidden // self.heads
        layer = self.hidden * (self.hidden + kv) + self.hidden**2 + 3 * self.hidden * self.ffn
        return self.layers * layer + 2 * self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of a position's keys and values in all layers, bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.hidden // self.heads

    def forward_flops(self, positions: int, context: float) -> float:
        """Two per parameter and position (the embedding's lookup is none), and attention over ``context`` keys."""
        return positions * (2 * (self.parameters - self.vocab * self.hidden) + 4 * self.layers * self.hidden * context)


LLAMA_8B = Model("Llama 3 8B", 32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Model("Llama 3 70B", 80, 8192, 28672, 64, 8, 128256)


@dataclass(frozen=True)
class Work:
    """An iteration: ``groups`` are sampled, scored and trained on once, ``batch`` groups per optimizer step."""

    groups: int = 512
    batch: int = 64
    prompt: int = 1024
    output: int = 512
    n: int = 8
    rows_in_flight: int = 256

    def positions(self, shared: bool = True) -> int:
        """Of a group's row or rows (groups.chunk_tokens)."""
        if shared:
            return self.prompt - 1 + self.n * self.output
        return self.n * (self.prompt - 1 + self.output)

    @property
    def context(self) -> float:
        """Mean number of keys that a position of a shared-prefix row attends to."""
        prefix = self.prompt - 1
        total = prefix * (prefix + 1) / 2 + self.n * self.output * (prefix + (self.output + 1) / 2)
        return total / self.positions()


@dataclass(frozen=True)
class Layout:
    tensor: int
    pipeline: int
    data: int

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


def memory(model: Model, work: Work, layout: Layout, c: Constants) -> dict[str, float]:
    """Bytes on one GPU at the training step, but for the key-value cache, which lives while sampling."""
    mine = model.parameters / (layout.tensor * layout.pipeline)
    # 1F1B: the first stage keeps p micro-batches of its L / p layers.
    activations = c.activation_bytes * work.positions() * model.hidden * model.layers / layout.tensor
    rows = min(work.rows_in_flight, math.ceil(work.groups / layout.data) * work.n)
    cache = model.kv_bytes * (rows / work.n * work.prompt + rows * work.output) / (layout.tensor * layout.pipeline)
    return {
        "weights": 2 * mine,
        "gradients": 4 * mine,
        "optimizer": 12 * mine / layout.data,
        "activations": activations,
        "cache": cache,
    }


def decode_step(model: Model, work: Work, layout: Layout, rows: int, c: Constants) -> float:
    """Seconds for one more token of ``rows`` rows, through all stages, at half the output length."""
    cache = model.kv_bytes * (rows / work.n * work.prompt + rows * work.output / 2)
    moved = (2 * model.parameters + cache) / layout.tensor / (c.hbm_bandwidth * c.hbm_efficiency)
    flops = model.forward_flops(rows, work.prompt + work.output / 2)
    computed = flops / layout.tensor / (c.peak_flops * c.matmul_efficiency)
    talk = 2 * model.layers * _all_reduce(rows * model.hidden * 2, layout.tensor, c)
    hops = (layout.pipeline - 1) * (c.collective_latency + rows * model.hidden * 2 / (c.infiniband * c.link_efficiency))
    return max(moved, computed) + talk + hops + model.layers * c.decode_overhead_per_layer


def seconds(model: Model, work: Work, layout: Layout, c: Constants, shared: bool = True) -> dict[str, float]:
    """Seconds of the parts of an iteration; ``shared``: training and scoring in shared-prefix rows."""
    mine = math.ceil(work.groups / layout.data)
    rows = min(work.rows_in_flight, mine * work.n)
    prefill_flops = model.forward_flops(mine * work.prompt, work.prompt / 2)
    # As many lanes of rows are in flight as there are stages, each lane in another stage.
    prefill = prefill_flops / (layout.tensor * layout.pipeline) / (c.peak_flops * c.matmul_efficiency)
    lane = math.ceil(rows / layout.pipeline)
    decode = mine * work.n / rows * work.output * decode_step(model, work, layout, lane, c)

    micro = math.ceil(work.batch / layout.data)
    steps = work.groups // work.batch
    positions = work.positions(shared)
    context = work.context if shared else (work.prompt + work.output) / 2
    shards = layout.tensor * layout.pipeline
    # A micro-batch through one stage; p stages work at a time, but for the bubble.
    forward = model.forward_flops(positions, context) / shards / (c.peak_flops * c.matmul_efficiency)
    talk = 2 * model.layers / layout.pipeline * _all_reduce(positions * model.hidden * 2, layout.tensor, c)
    bubble = layout.pipeline - 1
    # Scoring is one long forward pass over all groups, by prior and policy.
    scoring = 2 * (mine + bubble) * (forward + talk)
    training = steps * (micro + bubble) * (3 * forward + 2 * talk)
    per_shard = model.parameters / shards
    link = (c.nvlink if layout.gpus <= c.gpus_per_node else c.infiniband) * c.link_efficiency
    transfer = (4 + 2) * per_shard * (layout.data - 1) / layout.data / link
    optimizer = 2 * 16 * per_shard / layout.data / (c.hbm_bandwidth * c.hbm_efficiency)
    return {
        "prefill": prefill,
        "decode": decode,
        "scoring": scoring,
        "training": training,
        "reduction": steps * (c.exposed_data_parallel * transfer + optimizer),
    }


def _all_reduce(size: float, ranks: int, c: Constants) -> float:
    """A ring over NVLink."""
    if ranks == 1:
        return 0.0
    return c.collective_latency + 2 * (ranks - 1) / ranks * size / (c.nvlink * c.link_efficiency)


LAYOUTS = {
    LLAMA_8B: [Layout(4, 1, gpus // 4) for gpus in (8, 16, 32, 64, 128, 256, 512)],
    LLAMA_70B: [Layout(8, 1, 1), *(Layout(8, 4, gpus // 32) for gpus in (32, 64, 128, 256, 512))],
}


def measure(smoke: bool) -> dict:
    """The section's tables; nothing is measured, so ``smoke`` changes nothing."""
    constants, work = Constants(), Work()
    sizes, times = [], []
    for model, layouts in LAYOUTS.items():
        for layout in layouts:
            where = {
                "model": model.name,
                "gpus": layout.gpus,
                "split": f"{layout.tensor} x {layout.pipeline} x {layout.data}",
            }
            held = memory(model, work, layout, constants)
            whole = sum(held.values())
            prior = held["weights"]
            fits = "yes" if whole + prior <= constants.hbm_bytes else "with prior offloaded"
            sizes.append({**where, **held, "whole": whole, "fits": fits if whole <= constants.hbm_bytes else "no"})
            if whole > constants.hbm_bytes:
                continue
            parts = seconds(model, work, layout, constants)
            total = sum(parts.values())
            separate = seconds(model, work, layout, constants, shared=False)
            times.append(
                {
                    **where,
                    **parts,
                    "total": total,
                    "rate": work.groups * work.n * work.output / total / layout.gpus,
                    "separate": sum(separate.values()) / total,
                }
            )
    known = [
        {"name": field.name, "value": getattr(constants, field.name), "unit": unit, "source": source}
        for field in fields(Constants)
        for unit, source in [_SOURCES[field.name]]
    ]
    split = [("model", "model", "text"), ("gpus", "GPUs", "count"), ("split", "TP x PP x DP", "text")]
    columns = [("weights", "weights", "bytes"), ("gradients", "gradients (fp32)", "bytes")]
    columns += [("optimizer", "optimizer (distributed)", "bytes"), ("activations", "activations", "bytes")]
    columns += [("cache", "key-value cache", "bytes"), ("whole", "sum", "bytes"), ("fits", "fits 80 GB", "text")]
    parts = [(name, f"{name}, s", "number") for name in ("prefill", "decode", "scoring", "training")]
    parts += [("reduction", "gradient exchange and optimizer, s", "number"), ("total", "iteration, s", "number")]
    parts += [("rate", "output tokens/s per GPU", "number"), ("separate", "separate rows / this", "ratio")]
    text = f"""
An iteration: {work.groups} groups of {work.n} outputs, prompts of {work.prompt} and outputs of {work.output} tokens,
{work.batch} groups per optimizer step, one pass over them, shared-prefix rows of {work.positions():,} positions, one
group per micro-batch, at most {work.rows_in_flight} rows in flight per replica. bf16 weights, fp32 gradients,
distributed Adam with fp32 master weights, sequence parallelism, no recompute. Rewards are not counted. The sampler
keeps as many lanes of rows in flight as there are pipeline stages. The sum has no prior: a resident one takes as much
as the weights, and "yes" includes it.
"""
    return {
        "parts": [
            {
                "title": "Constants",
                "columns": [("name", "name", "text"), ("value", "value", "number"), *_TEXTS],
                "rows": known,
            },
            {"title": "Memory per GPU", "text": text, "columns": [*split, *columns], "rows": sizes},
            {"title": "Seconds per iteration", "columns": [*split, *parts], "rows": times},
        ],
        "targets": [],
    }
