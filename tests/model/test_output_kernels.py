"""The Triton kernels of the output layer: float64's log-probs and gradients. On a CPU Triton's interpreter runs them.

All of the output layer with them, over tensor-parallel ranks too, is in test_output_layer.py.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cards import DEVICE, ON_CARD
from compiled_kernels import compiled
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from nemo_brain.model import output_kernels, output_layer
from nemo_brain.model.output_layer import linear_logprobs

# Views, memory, what Triton's interpreter calls, and the copy to fp32, for which a card's product has no need.
COMPUTE_NOTHING = ("t", "slice", "view", "permute", "empty", "new_empty", "set_", "_to_copy")
SCALES = [(1.0,), (1 / 0.7,), (1.0, 0.5, 1.3)]
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 2e-2}  # logits up to 16, gradients up to 3


@pytest.mark.skipif(ON_CARD and torch.cuda.is_available(), reason="the next test runs it on the card")
@pytest.mark.parametrize("scales", SCALES)
def test_logprobs_and_gradients_are_float64s(scales):
    assert all(output_kernels.largest_gap(torch.device("cpu"), dtype, scales) < BOUNDS[dtype] for dtype in BOUNDS)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", SCALES)
def test_on_a_card_logprobs_and_gradients_are_float64s(scales):
    assert all(output_kernels.largest_gap(DEVICE, dtype, scales) < BOUNDS[dtype] for dtype in BOUNDS)


class _ChunkOperations(TorchDispatchMode):
    """Counts torch's operations that read or write something as large as a chunk of logits."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.found = elements, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in (*args, result) if isinstance(tensor, torch.Tensor)]
        name = str(func).split(".")[1]
        if any(tensor.numel() == self.elements for tensor in tensors) and name not in COMPUTE_NOTHING:
            self.found[name] += 1
        return result


@pytest.mark.parametrize(("kernels", "others"), [(output_kernels, 0), (None, 20)])
def test_torch_goes_over_the_logits_for_products_alone(kernels, others, monkeypatch):
    """Two chunks: a product each, forward; backward one more for the first, and two with the gradients of each."""
    monkeypatch.setattr(output_layer, "_kernels", lambda device, dtype: kernels)
    positions, columns = 7, 256
    hidden = torch.randn(positions, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2 * columns, 16, dtype=torch.bfloat16, requires_grad=True)
    with _ChunkOperations(positions * columns) as operations:
        targets = torch.arange(0, 2 * columns, 80)
        linear_logprobs(hidden, weight, targets, chunk_bytes=4 * positions * columns).sum().backward()
    assert operations.found.pop("mm") == 2 + 1 + 4
    assert operations.found.total() == others, operations.found


def test_they_are_used_on_a_card_where_they_work(monkeypatch):
    monkeypatch.setattr(output_kernels, "problem", lambda device: None if device.index == 0 else "wrong")
    cases = {("cuda:0", torch.float32): output_kernels, ("cuda:0", torch.float64): None}
    cases |= {("cpu", torch.float32): None, ("meta", torch.float32): None}
    output_layer._kernels.cache_clear()
    assert {case: output_layer._kernels(torch.device(case[0]), case[1]) for case in cases} == cases
    with pytest.warns(UserWarning, match="log-probs go by many passes over the logits: wrong"):
        assert output_layer._kernels(torch.device("cuda:1"), torch.float32) is None
    output_layer._kernels.cache_clear()


@pytest.mark.parametrize("broken", ["add_chunk", "logit_gradient"])
@pytest.mark.parametrize("how", ["another column", "NaN"])
def test_kernels_that_compute_something_else_are_told(broken, how, monkeypatch):
    whole = getattr(output_kernels, broken)

    def wrong(logits_TC, targets_T, start, *rest):
        return (
            whole(logits_TC, targets_T, start + 1, *rest)
            if how == "another column"
            else whole(logits_TC * torch.nan, targets_T, start, *rest)
        )

    assert output_kernels.problem(torch.device("cpu")) is None
    monkeypatch.setattr(output_kernels, broken, wrong)
    assert "away from float64 in torch.float32" in output_kernels.problem(torch.device("cpu"))


def test_columns_without_any_weight():
    """-inf in more columns than a program looks at together, before all others and between them."""
    logits = torch.randn(3, 3 * output_kernels._COLUMNS, generator=torch.Generator().manual_seed(0))
    logits[0, : output_kernels._COLUMNS] = logits[1, output_kernels._COLUMNS : -1] = -torch.inf
    logits[2, ::2] = -torch.inf
    targets, ones = torch.full((3,), logits.shape[1] - 1), torch.ones(1)
    max_T, sums_1T, target_T = torch.full((3,), -torch.inf), torch.zeros(1, 3), torch.zeros(3)
    output_kernels.add_chunk(logits, targets, 0, ones, max_T, sums_1T, target_T)
    torch.testing.assert_close(target_T - max_T - sums_1T[0].log(), logits.log_softmax(-1)[:, -1], atol=1e-5, rtol=0)
    given = (logits, targets, 0, ones, max_T, sums_1T, torch.ones(1, 3), torch.float32)
    expected = torch.nn.functional.one_hot(targets, logits.shape[1]) - logits.softmax(-1)
    torch.testing.assert_close(output_kernels.logit_gradient(*given), expected, atol=1e-6, rtol=0)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nemo_brain.model.output_kernels import _COLUMNS, _WARPS, _add, _gradient
state = {"logits": "*fp32", "targets": "*i64", "scales": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
numbers = dict.fromkeys(("stride", "positions", "columns", "start"), "i32")
for capability in (80, 90, 100):
    for scales in (1, 2):
        sizes = {"SCALES": scales, "COLUMNS": _COLUMNS}
        kernels = [(_add, {**state, "target_logits": "*fp32", **numbers, "count": "i32"})]
        kernels += [(_gradient, {**state, "grads": "*fp32", "out": out, **numbers}) for out in ("*fp32", "*bf16")]
        for kernel, signature in kernels:
            source = ASTSource(kernel, signature=signature | dict.fromkeys(sizes, "constexpr"), constexprs=sizes)
            made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
            print(len(made.asm["cubin"]), made.metadata.shared, made.asm["ptx"].count(".local"))
"""


def test_the_kernels_compile_for_cards(tmp_path):
    """Ampere, Hopper and Blackwell; nothing spills from the registers."""
    found = [[int(number) for number in line.split()] for line in compiled(COMPILE, tmp_path)]
    assert len(found) == 18 and all(size > 0 and shared < 2**15 and not local for size, shared, local in found), found
