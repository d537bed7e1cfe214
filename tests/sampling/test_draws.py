"""Draws are uniform, keyed, and become tokens of the law in question, however the vocabulary is split."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cards import DEVICE
from compiled_kernels import compiled
from devices import Operations
from laws import SIGNIFICANT, chi_square
from ranks import run_ranks
from scipy import stats

from nemo_brain.sampling import draws as draws_module
from nemo_brain.sampling.draws import agrees, draw_tokens, uniforms


def test_uniforms_are_uniform_and_keyed_by_every_part():
    key = dict(seed=1, iteration=2, prompt_id="p", output=3, positions=100_000)
    draws = uniforms(**key)
    assert draws.dtype == np.float64 and draws.min() > 0 and draws.max() < 1
    assert np.array_equal(draws, uniforms(**key))
    # A draw does not depend on how many follow: max_new_tokens changes no output's beginning.
    assert np.array_equal(draws[:7], uniforms(**{**key, "positions": 7}))
    for change in (dict(seed=2), dict(iteration=3), dict(prompt_id="p2"), dict(prompt_id=""), dict(output=4)):
        other = uniforms(**{**key, **change})
        assert not np.isin(other, draws).any(), change
        assert abs(np.corrcoef(draws, other)[0, 1]) < 4 / len(draws) ** 0.5, change  # four standard errors
    # Parts do not run together: 1|23 is not 12|3.
    assert not np.array_equal(uniforms(1, 23, "4", 5, 3), uniforms(12, 3, "4", 5, 3))
    first = np.array([uniforms(0, 0, f"p{i // 8}", i % 8, 1)[0] for i in range(20_000)])
    for sample in (draws, first):
        assert stats.kstest(sample, "uniform").pvalue > SIGNIFICANT
    pairs, *_ = np.histogram2d(draws[:-1], draws[1:], bins=10)
    assert stats.chisquare(pairs.ravel()).pvalue > SIGNIFICANT
    assert stats.kstest(first**1.05, "uniform").pvalue < SIGNIFICANT


def drawn(cases: list[tuple[torch.Tensor, torch.Tensor, int]], kernels: bool = False) -> list[tuple[torch.Tensor, ...]]:
    dist.init_process_group("gloo")
    if kernels:
        found = importlib.import_module("nemo_brain.sampling.draw_kernels")
        draws_module._kernels = lambda device: found
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD if ranks > 1 else None
    results = []
    for law, draws, real in cases:
        tokens, logprobs = draw_tokens(law.chunk(ranks, dim=1)[rank], draws, real, group)
        warm, warm_logprobs = draw_tokens(law.chunk(ranks, dim=1)[rank], draws, real, group, temperature=1.7)
        results.append((tokens, logprobs, warm, warm_logprobs))
    return results


def test_draw_tokens():
    generator = torch.Generator().manual_seed(0)

    def uniform(rows: int) -> torch.Tensor:
        return torch.rand(rows, generator=generator, dtype=torch.float64)

    # 48 columns, 25 real, enormous numbers in the padding: at TP4 the third rank has one real column, the fourth none.
    padded = 3 * torch.randn(4000, 48, generator=generator)
    padded[:, 25:] = 60.0
    # Probability zero at the beginning, at every rank's end, and (underflow) on all of rank 1 of 2 or rank 0 of 4.
    holes = 3 * torch.randn(4000, 48, generator=generator)
    holes[:, [0, 5, 11, 23, 24, 35, 47]] = -torch.inf
    holes[1000:2000, 24:47] -= 1e4
    holes[2000:3000, :12] -= 1e4
    probs = holes.double().softmax(-1)
    extremes = torch.tensor([1e-300, 2.0**-53, 0.5, 1 - 2.0**-52, 1 - 2.0**-53], dtype=torch.float64).repeat(800)
    # Draws within a few units of the last place of where two ranks' intervals meet.
    edges = (
        probs.cumsum(-1)[torch.arange(4000), torch.arange(4000) % 3 * 12 + 11] + (torch.arange(4000) % 9 - 4) * 2**-53
    )
    edges = edges.clamp(2**-53, 1 - 2**-53)
    small = torch.linspace(-2, 1, 12).repeat(30_000, 1)
    large = 2 * torch.randn(48, 131_072, generator=generator)
    cases = [(padded, uniform(4000), 25), (padded, extremes, 25), (holes, uniform(4000), 48), (holes, extremes, 48)]
    cases += [(holes, edges, 48), (small, uniform(30_000), 12), (large, uniform(48), 131_000)]
    # Draws that equal a cumulative probability, with tokens of probability zero there.
    exact = torch.tensor([[-torch.inf, 0.0] * 4]).repeat(3, 1)
    cases.append((exact, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 8))
    one, two, four = (run_ranks(drawn, ranks, cases) for ranks in (1, 2, 4))
    for name, results in (("TP2", two), ("TP4", four)):
        for index in (0, 1, 2, 3, 5, 6, 7):
            for result in results:
                for ours, theirs in zip(result[index], one[0][index], strict=True):
                    # fp32 exponentials, less each rank's own maximum.
                    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=f"{name} {index}")
    for results in (one, two, four):
        for result, (law, _, real) in zip(results[0], cases, strict=True):
            for tokens, logprobs, temperature in ((*result[:2], 1.0), (*result[2:], 1.7)):
                assert tokens.min() >= 0 and tokens.max() < real
                assert (law.gather(1, tokens[:, None])[:, 0] > law.amax(1) - 200).all(), "no token of probability zero"
                exact = (law[:, :real].double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                # fp32 logits of up to a hundred, divided by the temperature.
                torch.testing.assert_close(logprobs, exact, atol=2e-5, rtol=0)
        for result in results:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(result[4], results[0][4], strict=True))

    # By definition: the first token whose cumulative probability exceeds the draw.
    for index in (0, 2, 6, 7):
        law, draws, real = cases[index]
        for tokens, temperature in ((one[0][index][0], 1.0), (one[0][index][2], 1.7)):
            cumulative = (law[:, :real].double() / temperature).softmax(-1).cumsum(-1)
            assert torch.equal(tokens, (cumulative <= draws[:, None]).sum(-1)), index
    law = small[0].double().softmax(-1).numpy()
    assert chi_square(one[0][5][0].numpy(), law) > SIGNIFICANT
    assert chi_square(one[0][5][0].numpy(), law**0.95 / (law**0.95).sum()) < SIGNIFICANT


def test_on_a_device_the_number_of_operations_does_not_grow_with_the_rows():
    """And none of them reads the device: the meta device has nothing to read."""
    counts = []
    for device, rows in (("meta", 64), ("meta", 1024), ("cpu", 64)):
        draws = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
        with Operations() as operations:
            draw_tokens(torch.zeros(rows, 128_256, device=device), draws, 128_256)
        counts.append(len(operations.shapes))
    # On a CPU they go in chunks that its caches hold.
    assert counts[0] == counts[1] < 100 < counts[2]


def operations_of_a_draw(group, monkeypatch) -> list[tuple[int, ...]]:
    """Their shapes, beside the kernels. The meta device has no use for what they compute."""
    kernels = SimpleNamespace(
        draw=lambda logits, uniforms, *_: (uniforms, uniforms),
        block_masses=lambda logits, *_: (torch.empty(64, 251, device="meta"), torch.empty(64, 251, device="meta")),
        find_columns=lambda logits, *_: torch.empty(64, dtype=torch.int64, device="meta"),
    )
    monkeypatch.setattr(draws_module, "_kernels", lambda device: kernels)
    monkeypatch.setattr(draws_module, "gather", lambda tensor, group: tensor[None])
    draws = torch.full((64,), 0.5, dtype=torch.float64, device="meta")
    logits = torch.zeros(64, 128_256, device="meta")
    with Operations() as operations:
        draw_tokens(logits, draws, 128_256, group)
    return operations.shapes


def test_kernels_take_the_place_of_all_operations_or_of_half_where_ranks_share_the_vocabulary(monkeypatch):
    assert not operations_of_a_draw(None, monkeypatch)
    shared = operations_of_a_draw(SimpleNamespace(size=lambda: 1, rank=lambda: 0), monkeypatch)
    assert 30 < len(shared) < 55
    assert not [shape for shape in shared if len(shape) == 2 and shape[1] > 251], "none has the vocabulary's size"


def test_a_row_without_a_law_has_no_token_and_masked_columns_are_never_drawn():
    """Split over ranks as well: one rank alone has the NaN, or nothing but -inf."""
    law = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    law[0, 30] = torch.nan
    law[1, 3] = torch.inf
    law[2] = -torch.inf
    law[3, [5, 6, 40]] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    law[4, 47] = torch.nan  # padding
    law[5, :24] = -torch.inf  # all of rank 0 of 2, of ranks 0 and 1 of 4
    law[6] = -torch.inf
    law[6, 17] = -3.0
    law[7] = torch.finfo(torch.float32).min  # how some models mask; all alike it is a law
    draws = torch.full((9,), 0.4, dtype=torch.float64)
    for ranks in (1, 2, 4):
        for ((tokens, logprobs, warm, warm_logprobs),) in run_ranks(drawn, ranks, [(law, draws, 47)]):
            for found, values, temperature in ((tokens, logprobs, 1.0), (warm, warm_logprobs, 1.7)):
                assert found[:4].tolist() == [-1] * 4
                exact = (law[4:, :47].double() / temperature).log_softmax(-1)
                assert torch.equal(found[4:], (exact.exp().cumsum(-1) <= 0.4).sum(-1))
                # fp32 exponentials and quotients.
                torch.testing.assert_close(values[4:], exact.gather(1, found[4:, None])[:, 0], atol=2e-6, rtol=0)
                assert found[5] >= 24 and found[6] == 17


@pytest.fixture
def kernels(monkeypatch):
    """Triton's kernels, interpreted (see conftest.py), in the place of many operations."""
    pytest.importorskip("triton")
    found = importlib.import_module("nemo_brain.sampling.draw_kernels")
    monkeypatch.setattr(draws_module, "_kernels", lambda device: found)
    return found


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_draw_the_first_token_whose_cumulative_probability_exceeds_the_draw(kernels, temperature, dtype):
    generator = torch.Generator().manual_seed(0)
    law = (2 * torch.randn(24, 1300, generator=generator)).to(dtype)  # two blocks and a part of one
    law[:8, 512:1024] = -torch.inf
    law[8:16, :700] -= 200  # no weight in fp32
    law[:, 1200:] = 60.0  # padding
    uniform = torch.rand(24, generator=generator, dtype=torch.float64)
    uniform[:3] = torch.tensor([1e-300, 1 - 2.0**-53, 0.5])
    tokens, logprobs = draw_tokens(law, uniform, 1200, temperature=temperature)
    exact = (law[:, :1200].double() / temperature).log_softmax(-1)
    assert torch.equal(tokens, (exact.exp().cumsum(-1) <= uniform[:, None]).sum(-1).clamp(max=1199))
    # fp32 logits, divided by the temperature, and fp32 sums of blocks.
    torch.testing.assert_close(logprobs, exact.gather(1, tokens[:, None])[:, 0], atol=2e-6, rtol=0)


def test_kernels_see_rows_without_a_law_and_never_draw_what_has_no_probability(kernels):
    law = torch.randn(6, 600, generator=torch.Generator().manual_seed(1))
    law[0, 30], law[1, 3], law[2] = torch.nan, torch.inf, -torch.inf
    law[3, :599] = -torch.inf
    law[4] = torch.tensor([-torch.inf, 0.0]).repeat(300)
    law[5] = torch.finfo(torch.float32).min
    # In row 4 the draw equals a cumulative probability, and the next token has none.
    draws = torch.tensor([0.4, 0.4, 0.4, 1 - 2.0**-53, 0.5, 0.25], dtype=torch.float64)
    tokens, _ = draw_tokens(law, draws, 600)
    assert tokens.tolist() == [-1, -1, -1, 599, 301, 150]


def test_kernels_are_used_only_where_they_draw_what_they_should(kernels):
    assert agrees(kernels, torch.device("cpu"))

    def others(**changed) -> SimpleNamespace:
        given = {name: getattr(kernels, name) for name in ("block_masses", "find_columns", "draw")}
        return SimpleNamespace(**given | changed)

    def moved(change):
        def draw(*args):
            tokens, logprobs = kernels.draw(*args)
            return change(tokens, logprobs)

        return draw

    wrong = [
        others(find_columns=lambda *args, **options: kernels.find_columns(*args, **options) + 1),
        others(block_masses=lambda *args: [part * 1.001 for part in kernels.block_masses(*args)]),
        others(draw=moved(lambda tokens, logprobs: ((tokens - 1).clamp(min=0), logprobs))),
        others(draw=moved(lambda tokens, logprobs: (tokens, logprobs + 1e-3))),
        others(draw=moved(lambda tokens, logprobs: (tokens, logprobs * torch.nan))),
    ]
    assert not any(agrees(each, torch.device("cpu")) for each in wrong)


def test_kernels_draw_alike_on_all_layouts_and_one_of_two_neighbours_where_intervals_meet():
    """Of laws with padding, and columns and whole ranks without probability."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    law = 3 * torch.randn(60, 1200, generator=generator)  # at TP4 300 columns a rank, at TP2 two blocks
    law[:, [0, 5, 299, 300, 599, 900]] = -torch.inf
    law[20:30, 600:] -= 1e4
    law[30:40, :300] -= 1e4
    law[:, 1100:] = 60.0  # padding
    cumulative = law[:, :1100].double().softmax(-1).cumsum(-1)
    inside = torch.rand(60, generator=generator, dtype=torch.float64)
    column = torch.randint(1, 1099, (60,), generator=generator)
    # Within a few units of the last place of fp32 of where two tokens' intervals meet: either may be drawn.
    meeting = (cumulative.gather(1, column[:, None])[:, 0] + (torch.arange(60) % 9 - 4) * 2**-24).clamp(1e-9, 1 - 1e-9)
    one, two, four = (run_ranks(drawn, ranks, [(law, inside, 1100), (law, meeting, 1100)], True) for ranks in (1, 2, 4))
    for results in (one, two, four):
        assert all(torch.equal(result[0][0], (cumulative <= inside[:, None]).sum(-1)) for result in results)
        assert all(torch.equal(result[1][0], results[0][1][0]) for result in results), "ranks agree"
        tokens = results[0][1][0]
        ends = torch.cat([torch.zeros(60, 1, dtype=torch.float64), cumulative], dim=1)
        begin, end = (ends.gather(1, place[:, None])[:, 0] for place in (tokens, tokens + 1))
        assert (end > begin).all(), "never a token without probability"
        assert (begin - 1e-6 < meeting).all() and (meeting < end + 1e-6).all()


@pytest.mark.gpu
def test_on_a_card_kernels_draw_what_they_should():
    pytest.importorskip("triton")
    assert agrees(importlib.import_module("nemo_brain.sampling.draw_kernels"), DEVICE)


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemo_brain.sampling import draw_kernels
numbers = dict(stride="i32", columns="i32", blocks="i32", temperature="fp32", BLOCK="constexpr", BLOCKS="constexpr")
draw = dict(uniforms="*fp64", peaks="*fp32", sums="*fp32", tokens="*i64", logprobs="*fp64")
masses, find = dict(peaks="*fp32", sums="*fp32"), dict(peaks="*fp64", ends="*fp64", locals_="*fp64", found="*i64")
for capability in (80, 90, 100):
    for logits in ("*fp32", "*bf16"):
        kernels = [(draw_kernels._masses, masses, 8), (draw_kernels._find, find, 256), (draw_kernels._draw, draw, 256)]
        for kernel, given, blocks in kernels:
            sizes = {"BLOCK": 512, "BLOCKS": blocks}
            source = ASTSource(kernel, signature={"logits": logits, **given, **numbers}, constexprs=sizes)
            print(len(compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]))
"""


def test_kernels_compile_for_cards(tmp_path):
    """Ampere, Hopper and Blackwell: what no interpreter shows."""
    pytest.importorskip("triton")
    assert len([size for size in compiled(COMPILE, tmp_path) if int(size) > 0]) == 18
