"""A model of an iteration's memory and time on GPUs: arithmetic with a data sheet's numbers and with how well one H100
was used when this code was measured on it. What it says of other cards, larger models and several GPUs is extrapolated.

Symbols: N parameters, L layers, h hidden size, P prompt and R output tokens, n outputs per group; t tensor-, p
pipeline-, d data-parallel size; m micro-batches per rank and step. Bytes and seconds throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Card:
    """What a data sheet says: FLOP/s (bf16, dense), bytes/s and bytes of its memory, bytes/s to another of its node
    (one direction)."""

    flops: float
    bandwidth: float
    memory: float
    link: float


# NVIDIA's data sheets; SXM modules but for l40s, whose link is PCIe.
CARDS = {
    "a100-40gb": Card(312e12, 1.555e12, 40e9, 300e9),
    "a100-80gb": Card(312e12, 2.039e12, 80e9, 300e9),
    "l40s": Card(362e12, 0.864e12, 48e9, 32e9),
    "h100": Card(989e12, 3.35e12, 80e9, 450e9),
    "h200": Card(989e12, 4.8e12, 141e9, 450e9),
    "b200": Card(2250e12, 8e12, 180e9, 900e9),
}


@dataclass(frozen=True)
class Rates:
    """How well a card is used; ``SOURCES`` says where each number comes from."""

    shared_efficiency: float = 0.17
    separate_efficiency: float = 0.33
    hbm_efficiency: float = 0.7
    link_efficiency: float = 0.8
    infiniband: float = 50e9
    host_link: float = 50e9
    collective_latency: float = 20e-6
    launch_per_layer: float = 2.0e-3
    draw_per_row: float = 53e-6
    exposed_data_parallel: float = 0.5
    activation_bytes: float = 59.0
    fixed_bytes: float = 1.6e9
    usable: float = 0.92


_MEASURED = "measured: one H100, a Llama of 1.24e9 parameters, 2026-11-26"
SOURCES = {
    "shared_efficiency": ("of the card's FLOP/s, rows with a shared prefix and prefill", _MEASURED + " (0.15 to 0.20)"),
    "separate_efficiency": ("of the card's FLOP/s, separate rows", _MEASURED + " (0.30 to 0.38)"),
    "hbm_efficiency": ("of the memory's bandwidth, in decoding", "assumption"),
    "link_efficiency": ("of links between cards and between nodes", "assumption"),
    "infiniband": ("bytes/s per GPU between nodes", "one 400 Gb/s port per GPU, as in NVIDIA's DGX H100"),
    "host_link": ("bytes/s between a card and its host", "PCIe 5 x16: 63e9, assumption: 0.8 of it"),
    "collective_latency": ("s per collective or hop", "assumption"),
    "launch_per_layer": ("s per layer of a token step: kernel launches without CUDA graphs", _MEASURED + ", 64 rows"),
    "draw_per_row": (
        "s per row of a token step: drawing from a vocabulary of 128,256",
        _MEASURED + ", 64 to 1024 rows",
    ),
    "exposed_data_parallel": ("of the gradients' and weights' transfer, the rest overlaps", "assumption"),
    "activation_bytes": ("per position, layer and hidden unit, over t; no recompute", _MEASURED),
    "fixed_bytes": ("the output layer's and the device's own", _MEASURED),
    "usable": ("of the card's memory, before fragments and NCCL's buffers", "assumption"),
}


@dataclass(frozen=True)
class Model:
    """A GPT's shape: ``head_width`` of attention; ``gated``: the feed-forward layer has three matrices instead of two;
    ``tied``: embedding and output layer are one."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    gated: bool = True
    tied: bool = False

    @classmethod
    def of(cls, gpt: Any) -> Model:
        """Of NeMo's ``GPTConfig``."""
        return cls(
            layers=gpt.num_layers,
            hidden=gpt.hidden_size,
            ffn=gpt.ffn_hidden_size or 4 * gpt.hidden_size,
            heads=gpt.num_attention_heads,
            kv_heads=gpt.num_query_groups or gpt.num_attention_heads,
            head_width=gpt.kv_channels or gpt.hidden_size // gpt.num_attention_heads,
            vocab=gpt.vocab_size,
            gated=gpt.gated_linear_unit,
            tied=gpt.share_embeddings_and_output_weights,
        )

    @property
    def layer_parameters(self) -> int:
        """Matrices only; norms and biases are below 0.1%."""
        attention = 2 * self.heads * self.head_width + 2 * self.kv_heads * self.head_width
        return self.hidden * attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of a position's keys and values in all layers, bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_width

    def forward_flops(self, positions: int, context: float) -> float:
        """Two per parameter and position (the embedding's lookup is none), and attention over ``context`` keys."""
        products = self.layers * self.layer_parameters + self.vocab * self.hidden
        return positions * (2 * products + 4 * self.layers * self.heads * self.head_width * context)


MODELS: Mapping[str, Model] = {
    "llama-1b": Model(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "llama-8b": Model(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-70b": Model(80, 8192, 28672, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Work:
    """An iteration: ``groups`` are sampled, scored and trained on once, ``batch`` groups per optimizer step."""

    groups: int = 512
    batch: int = 64
    prompt: int = 1024
    output: int = 512
    n: int = 8
    rows_in_flight: int = 256

    @property
    def row(self) -> int:
        """Positions of a separate row."""
        return self.prompt - 1 + self.output

    def positions(self, shared: bool = True) -> int:
        """Of a group's row or rows (core.packing.chunk_tokens)."""
        return self.prompt - 1 + self.n * self.output if shared else self.n * self.row

    @property
    def context(self) -> float:
        """Mean number of keys that a position of a shared-prefix row attends to."""
        prefix = self.prompt - 1
        total = prefix * (prefix + 1) / 2 + self.n * self.output * (prefix + (self.output + 1) / 2)
        return total / self.positions()


@dataclass(frozen=True)
class Plan:
    """How a model is split and what is kept.

    recompute: activations of every layer are computed again. prior: ``resident``, ``offload`` or ``adapter_off`` (which
    is LoRA's: no gradients but the adapters'). shared: rows with a shared prefix, a group per micro-batch; otherwise an
    output per micro-batch, in two passes. proposal: it has weights of its own, which are where the prior's are.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    recompute: bool = False
    prior: str = "resident"
    shared: bool = True
    proposal: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


def memory(model: Model, work: Work, plan: Plan, rates: Rates) -> dict[str, float]:
    """Bytes on the fullest GPU. Activations and the key-value cache are not there at the same time."""
    # The first and the last of several stages have an embedding or an output layer.
    vocabularies = 1 if plan.pipeline > 1 or model.tied else 2
    layers = model.layers / plan.pipeline
    mine = (layers * model.layer_parameters + vocabularies * model.vocab * model.hidden) / plan.tensor
    trained = 0.0 if plan.prior == "adapter_off" else mine
    positions = work.positions() if plan.shared else work.row
    # 1F1B: the first stage keeps p micro-batches of its L / p layers.
    kept = 2 * model.layers + rates.activation_bytes if plan.recompute else rates.activation_bytes * model.layers
    rows = min(work.rows_in_flight, math.ceil(work.groups / plan.data) * work.n)
    cache = model.kv_bytes * (rows / work.n * work.prompt + rows * work.output) / (plan.tensor * plan.pipeline)
    return {
        "weights": 2 * mine,
        "prior": 2 * mine if plan.prior == "resident" else 0.0,
        "proposal": 2 * mine if plan.prior == "resident" and plan.proposal else 0.0,
        "gradients": 4 * trained,
        "optimizer": 12 * trained / plan.data,
        "activations": kept * positions * model.hidden / plan.tensor,
        "cache": cache,
        "fixed": rates.fixed_bytes,
    }


def peak(held: Mapping[str, float]) -> float:
    """Bytes when most is held: while training, or while sampling."""
    always = sum(size for name, size in held.items() if name not in ("activations", "cache"))
    return always + max(held["activations"], held["cache"])


def decode_step(model: Model, work: Work, plan: Plan, rows: int, card: Card, rates: Rates) -> float:
    """Seconds for one more token of ``rows`` rows, through all stages, at half the output length."""
    cache = model.kv_bytes * (rows / work.n * work.prompt + rows * work.output / 2)
    moved = (2 * model.parameters + cache) / plan.tensor / (card.bandwidth * rates.hbm_efficiency)
    flops = model.forward_flops(rows, work.prompt + work.output / 2)
    computed = flops / plan.tensor / (card.flops * rates.separate_efficiency)
    talk = 2 * model.layers * _all_reduce(rows * model.hidden * 2, plan.tensor, card, rates)
    hop = rates.collective_latency + rows * model.hidden * 2 / (rates.infiniband * rates.link_efficiency)
    waits = model.layers * rates.launch_per_layer + rows * rates.draw_per_row
    return max(moved, computed) + talk + (plan.pipeline - 1) * hop + waits


def seconds(model: Model, work: Work, plan: Plan, card: Card, rates: Rates) -> dict[str, float]:
    """Seconds of the parts of an iteration, without the reward's."""
    mine = math.ceil(work.groups / plan.data)
    shards = plan.tensor * plan.pipeline
    rows = min(work.rows_in_flight, mine * work.n)
    prefill = model.forward_flops(mine * work.prompt, work.prompt / 2)
    # As many lanes of rows are in flight as there are stages, each lane in another stage.
    lane = math.ceil(rows / plan.pipeline)
    decode = mine * work.n / rows * work.output * decode_step(model, work, plan, lane, card, rates)

    micro = math.ceil(work.batch / plan.data)
    steps = work.groups // work.batch
    bubble = plan.pipeline - 1
    shared, separate = (_forward(model, work, plan, card, rates, whole) for whole in (True, False))
    # Scoring is one long forward pass over all groups, by prior and policy, and by a proposal with its own weights.
    forward, talk = shared if plan.shared else (work.n * part for part in separate)
    scoring = (2 + plan.proposal) * (mine + bubble) * (forward + talk)
    # Forward and twice as much backward; once more to recompute, and once more for the first of two passes.
    passes = 3 + plan.recompute + (not plan.shared)
    training = steps * (micro + bubble) * (passes * forward + (passes - 1) * talk)
    trained = 0.0 if plan.prior == "adapter_off" else model.parameters / shards
    link = (card.link if plan.gpus <= GPUS_PER_NODE else rates.infiniband) * rates.link_efficiency
    transfer = (4 + 2) * trained * (plan.data - 1) / plan.data / link
    optimizer = 2 * 16 * trained / plan.data / (card.bandwidth * rates.hbm_efficiency)
    # In and out again, the two directions at the same time.
    moved = 2 * 2 * model.parameters / shards / rates.host_link if plan.prior == "offload" else 0.0
    return {
        "sampling": prefill / shards / (card.flops * rates.shared_efficiency) + decode + plan.proposal * moved,
        "scoring": scoring + (1 + plan.proposal) * moved,
        "training": training + steps * (rates.exposed_data_parallel * transfer + optimizer),
    }


def _forward(model: Model, work: Work, plan: Plan, card: Card, rates: Rates, shared: bool) -> tuple[float, float]:
    """Seconds that a micro-batch takes in one stage: to compute, and to talk; p stages work at a time."""
    positions = work.positions() if shared else work.row
    context = work.context if shared else work.row / 2
    efficiency = rates.shared_efficiency if shared else rates.separate_efficiency
    flops = model.forward_flops(positions, context) / (plan.tensor * plan.pipeline)
    size = positions * model.hidden * 2
    talk = 2 * model.layers / plan.pipeline * _all_reduce(size, plan.tensor, card, rates)
    return flops / (card.flops * efficiency), talk


def _all_reduce(size: float, ranks: int, card: Card, rates: Rates) -> float:
    """A ring over the node's links."""
    if ranks == 1:
        return 0.0
    return rates.collective_latency + 2 * (ranks - 1) / ranks * size / (card.link * rates.link_efficiency)


def plans(model: Model, work: Work, gpus: int, lora: bool, proposal: bool = False) -> list[Plan]:
    """Every way to split the model over so many GPUs; of each the ways to keep less, those first that cost least."""
    found = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (size for size in range(1, gpus + 1) if model.layers % size == 0):
            data, left = divmod(gpus, tensor * pipeline)
            if left or data > work.batch or model.heads % tensor or model.kv_heads % tensor:
                continue
            priors = ("adapter_off",) if lora else ("resident", "offload")
            found += [
                Plan(tensor, pipeline, data, recompute, prior, shared, proposal)
                for shared in (True, False)
                for recompute in (False, True)
                for prior in priors
            ]
    return found


def best(
    model: Model, work: Work, gpus: int, card: Card, rates: Rates, lora: bool = False, proposal: bool = False
) -> list[Plan]:
    """Of each split the quickest plan that fits, the quickest split first."""
    chosen: dict[tuple[int, int], Plan] = {}
    for plan in plans(model, work, gpus, lora, proposal):
        if peak(memory(model, work, plan, rates)) <= rates.usable * card.memory:
            held = chosen.get((plan.tensor, plan.pipeline))
            if held is None or total(model, work, plan, card, rates) < total(model, work, held, card, rates):
                chosen[plan.tensor, plan.pipeline] = plan
    return sorted(chosen.values(), key=lambda plan: total(model, work, plan, card, rates))


def total(model: Model, work: Work, plan: Plan, card: Card, rates: Rates) -> float:
    """Seconds of an iteration."""
    return sum(seconds(model, work, plan, card, rates).values())
