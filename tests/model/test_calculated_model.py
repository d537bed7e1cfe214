"""benchmarks/calculated.py against numbers computed by hand."""

from __future__ import annotations

import pytest

from benchmarks.calculated import (
    LLAMA_8B,
    LLAMA_70B,
    Constants,
    Layout,
    Work,
    decode_step,
    measure,
    memory,
    seconds,
)

# Ideal and round: 1 PFLOP/s, 1 TB/s, no latencies.
ROUND = Constants(
    peak_flops=1e15,
    hbm_bandwidth=1e12,
    nvlink=1e11,
    infiniband=1e10,
    matmul_efficiency=0.5,
    hbm_efficiency=1.0,
    link_efficiency=1.0,
    collective_latency=0.0,
    decode_overhead_per_layer=0.0,
    exposed_data_parallel=1.0,
)


def test_parameters_are_those_of_the_published_models():
    # Per layer of 8B: q and o 4096x4096, k and v 4096x1024, three of 4096x14336; then embedding and output layer.
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert LLAMA_8B.parameters == 32 * layer + 2 * 128256 * 4096 == 8_029_995_008
    assert LLAMA_70B.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert LLAMA_8B.kv_bytes == 131_072, "128 KiB: 32 layers of 8 heads of 128 keys and values in bf16"


def test_positions_and_context_of_a_row():
    work = Work(prompt=3, output=2, n=2)
    assert work.positions() == 2 + 2 * 2
    assert work.positions(shared=False) == 2 * (2 + 2)
    # The prefix's two positions see 1 and 2 keys; each output's two see 2 + 1 and 2 + 2.
    assert work.context == pytest.approx((1 + 2 + 2 * (3 + 4)) / 6)


def test_forward_flops():
    # 7,504,658,432 parameters without the embedding; attention 4 x 32 x 4096 per key.
    assert LLAMA_8B.forward_flops(10, 100) == 10 * (2 * 7_504_658_432 + 4 * 32 * 4096 * 100)


def test_memory_by_hand():
    held = memory(LLAMA_8B, Work(groups=8, prompt=1024, output=512, n=8), Layout(4, 1, 2), Constants())
    mine = 8_029_995_008 / 4
    assert held["weights"] == 2 * mine and held["gradients"] == 4 * mine and held["optimizer"] == 6 * mine
    assert held["activations"] == 34 * 5119 * 4096 * 32 / 4
    # 4 groups on a replica: 32 rows of 512 positions and 4 prompts of 1024, a quarter of each on this GPU.
    assert held["cache"] == 131_072 * (4 * 1024 + 32 * 512) / 4


def test_a_decode_step_is_bound_by_memory_then_by_communication():
    work = Work(prompt=1024, output=512, n=8)
    # One GPU, 8 rows: 16.06 GB of weights, 131072 x (1024 + 8 x 256) bytes of cache, at 1 TB/s; computing: 0.3 ms.
    moved = 16_059_990_016 + 131_072 * (1024 + 2048)
    assert decode_step(LLAMA_8B, work, Layout(1, 1, 1), 8, ROUND) == pytest.approx(moved / 1e12)
    # Two GPUs: half of it each, and 64 all-reduces of 8 x 4096 bf16 numbers, whose ring moves them once.
    halved = moved / 2 / 1e12 + 64 * 8 * 4096 * 2 / 1e11
    assert decode_step(LLAMA_8B, work, Layout(2, 1, 1), 8, ROUND) == pytest.approx(halved)
    # Two stages work on the same rows one after the other, and hand them over at 10 GB/s.
    staged = moved / 1e12 + 8 * 4096 * 2 / 1e10
    assert decode_step(LLAMA_8B, work, Layout(1, 2, 1), 8, ROUND) == pytest.approx(staged)


def test_seconds_by_hand():
    work = Work(groups=4, batch=2, prompt=1024, output=512, n=8)
    forward = LLAMA_8B.forward_flops(5119, work.context) / 5e14
    one = seconds(LLAMA_8B, work, Layout(1, 1, 1), ROUND)
    assert one["scoring"] == pytest.approx(2 * 4 * forward)
    assert one["training"] == pytest.approx(4 * 3 * forward)
    assert one["prefill"] == pytest.approx(LLAMA_8B.forward_flops(4096, 512) / 5e14)
    assert one["decode"] == pytest.approx(512 * decode_step(LLAMA_8B, work, Layout(1, 1, 1), 32, ROUND))
    assert one["reduction"] == pytest.approx(2 * 32 * 8_029_995_008 / 1e12), "two steps of the optimizer alone"
    # Two stages: two micro-batches take three slots of half a model's time each.
    staged = seconds(LLAMA_8B, work, Layout(1, 2, 1), ROUND)
    assert staged["training"] == pytest.approx(2 * 3 * 3 * forward / 2)
    # Two lanes of 16 rows, each in one of the stages: while one lane passes through both, so does the other.
    assert staged["decode"] == pytest.approx(512 * decode_step(LLAMA_8B, work, Layout(1, 2, 1), 16, ROUND))
    assert staged["prefill"] == pytest.approx(one["prefill"] / 2)
    # Two replicas: half the groups each; (4 + 2) bytes of each parameter, of which a ring of two sends half.
    doubled = seconds(LLAMA_8B, work, Layout(1, 1, 2), ROUND)
    assert doubled["training"] == pytest.approx(one["training"] / 2)
    assert doubled["reduction"] == pytest.approx(2 * (6 * 8_029_995_008 / 2 / 1e11 + 16 * 8_029_995_008 / 1e12))
    separate = seconds(LLAMA_8B, work, Layout(1, 1, 1), ROUND, shared=False)
    assert separate["training"] / one["training"] == pytest.approx(8 * 1535 / 5119, rel=0.05)


def test_the_section_says_what_does_not_fit():
    _, sizes, times = measure(smoke=True)["parts"]
    fits = {(row["model"], row["gpus"]): row["fits"] for row in sizes["rows"]}
    assert fits["Llama 3 70B", 8] == "no" and fits["Llama 3 70B", 32] == "yes"
    assert ("Llama 3 70B", 8) not in {(row["model"], row["gpus"]) for row in times["rows"]}
