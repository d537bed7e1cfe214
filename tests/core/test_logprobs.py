"""Vocabulary-parallel log-probs against float64 log_softmax of the whole vocabulary: values, gradients, memory.

Shapes: B rows, S positions, V vocabulary (whole, or a rank's shard).
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cards import DEVICE, ON_CARD, no_waiting
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from nemo_brain.core.logprobs import vocab_parallel_logprobs

B, S, V = 3, 7, 48
CASES = [
    # dtype, temperature, real vocabulary; 25 of 48 leaves a shard of one real column at TP 2, an empty one at TP 4
    (torch.float64, 1.0, V),
    (torch.float32, 1.0, V),
    (torch.float32, 0.7, 41),
    (torch.float32, 1.3, 25),
    (torch.bfloat16, 1.0, V),
    (torch.bfloat16, 0.7, 25),
    (torch.float16, 1.0, 11),
]
# Values are accumulated in float32 (1e-7 per operation, logits of tens) or float64. The gradient is rounded once more,
# to the logits' dtype: half a unit in the last place.
VALUE_ERROR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(dtype: torch.dtype, real_vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] with enormous numbers in the padding, targets and the loss's gradient [B, S]."""
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(B, S, V, generator=generator)).to(dtype)
    logits[..., real_vocab_size:] = 6e4
    targets = torch.randint(real_vocab_size, (B, S), generator=generator)
    return logits, targets, torch.randn(B, S, generator=generator)


def reference(logits, targets, grad, temperature, real_vocab_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and d(sum of grad * log-probs) / d logits by torch's own log_softmax, in float64."""
    leaf = logits.detach().double().requires_grad_()
    real = leaf[..., :real_vocab_size] / temperature
    logprobs = real.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    (logprobs * grad).sum().backward()
    return logprobs.detach(), leaf.grad


def on_ranks(function, ranks: int, *args) -> list:
    return run_ranks(_with_group, ranks, function, *args)


def _with_group(function, *args):
    dist.init_process_group("gloo", init_method="env://")
    try:
        return function(dist.group.WORLD, *args)
    finally:
        dist.destroy_process_group()


def _every_case(group) -> None:
    rank, width = dist.get_rank(group), V // dist.get_world_size(group)
    columns = slice(rank * width, (rank + 1) * width)
    for case in CASES:
        _check(case, group, columns)


def _check(case, group, columns: slice) -> None:
    dtype, temperature, real_vocab_size = case
    logits, targets, grad = draw(dtype, real_vocab_size)
    expected, expected_grad = reference(logits, targets, grad, temperature, real_vocab_size)
    for chunk_bytes in (1, 700, 2**20):  # a position, a few (not a divisor of B * S), all of them
        shard = logits[..., columns].clone().requires_grad_()
        logprobs = vocab_parallel_logprobs(
            shard, targets, group, temperature=temperature, real_vocab_size=real_vocab_size, chunk_bytes=chunk_bytes
        )
        assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (logprobs * grad).sum().backward()
        assert torch.equal(shard.detach(), logits[..., columns]), "logits were modified"
        assert shard.grad.dtype == dtype
        torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=VALUE_ERROR[dtype], msg=f"{case}")
        difference = (shard.grad.double() - expected_grad[..., columns]).abs()
        allowed = GRADIENT_ERROR[dtype] * expected_grad[..., columns].abs() + 1e-6 * (dtype != torch.float64) + 1e-15
        assert (difference <= allowed).all(), (case, difference.max())
        padding = torch.arange(V)[columns] >= real_vocab_size
        assert (shard.grad[..., padding] == 0).all()


def test_one_rank_without_a_group():
    for case in CASES:
        _check(case, None, slice(None))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_ranks(ranks):
    on_ranks(_every_case, ranks)


def _count_collectives(group) -> tuple[list, list]:
    """The collectives of a forward, and of two backwards through one graph and of empty inputs' backward."""
    calls = []
    all_reduce = dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, **options):
        calls.append((op, tensor.numel()))
        return all_reduce(tensor, op=op, **options)

    dist.all_reduce = counted  # this process ends with the test
    logits, targets, grad = draw(torch.float32, V)
    shard = logits.chunk(2, -1)[dist.get_rank(group)].clone().requires_grad_()
    logprobs = vocab_parallel_logprobs(shard, targets, group, chunk_bytes=700)
    forward = calls.copy()
    calls.clear()
    (first,) = torch.autograd.grad(logprobs, shard, grad, retain_graph=True)
    (again,) = torch.autograd.grad(logprobs, shard, grad)
    assert torch.equal(first, again)
    return [op == dist.ReduceOp.MAX for op, _ in forward], [count for _, count in forward], calls


def test_two_collectives_forward_and_none_backward():
    for is_max, counts, backward in on_ranks(_count_collectives, 2):
        assert is_max == [True, False]
        assert counts == [B * S, 2 * B * S]
        assert backward == []


def _empty_inputs(group) -> tuple:
    logits = torch.zeros(B, 0, V // 2, requires_grad=True)
    logprobs = vocab_parallel_logprobs(logits, torch.zeros(B, 0, dtype=torch.int64), group)
    logprobs.sum().backward()
    return tuple(logprobs.shape), tuple(logits.grad.shape)


def test_no_positions():
    assert on_ranks(_empty_inputs, 2) == [((B, 0), (B, 0, V // 2))] * 2


def peak_bytes(function) -> int:
    """The most memory that torch's CPU allocator held during the call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def _measure_memory(group) -> dict[str, int]:
    positions, shard, chunk_bytes = 512, 4096, 2**16
    logits = torch.randn(positions, shard).bfloat16().requires_grad_()
    targets = torch.randint(2 * shard, (positions,), generator=torch.Generator().manual_seed(0))
    kept = []
    forward = peak_bytes(lambda: kept.append(vocab_parallel_logprobs(logits, targets, group, chunk_bytes=chunk_bytes)))
    backward = peak_bytes(lambda: kept[0].sum().backward())
    softmax = peak_bytes(lambda: logits.detach().float().log_softmax(-1))
    return {"forward": forward, "backward": backward, "softmax": softmax}


def test_memory_is_a_chunk_and_the_gradient():
    numbers_per_position, chunk, whole = 512 * 8, 2**16, 512 * 4096
    for peak in on_ranks(_measure_memory, 2):
        # The instrument sees what it should: the cast and the softmax of all positions.
        assert 8 * whole <= peak["softmax"] <= 8 * whole + chunk
        # A dozen numbers per position; the output is among them.
        assert chunk <= peak["forward"] <= chunk + 12 * numbers_per_position
        assert 2 * whole + chunk <= peak["backward"] <= 2 * whole + chunk + 12 * numbers_per_position


def test_logits_of_any_size():
    logits = torch.tensor([300.0, 100.0, -1e4]).expand(3, 3)  # the exponential of 300 is beyond float32
    for temperature in (0.5, 1.0, 2.0):
        logprobs = vocab_parallel_logprobs(logits, torch.arange(3), temperature=temperature)
        expected = [0.0, -200 / temperature, -10300 / temperature]  # exp(-100) and less vanish beside 1
        assert logprobs.tolist() == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": torch.tensor([0, V])}, f"target {V} is outside the vocabulary of {V} tokens"),
        ({"targets": torch.tensor([-1, 0])}, "target -1 is outside"),
        ({"targets": torch.tensor([0, 40]), "real_vocab_size": 40}, "target 40 is outside the vocabulary of 40 tokens"),
        ({"targets": torch.tensor([0])}, r"targets are \[1\] for logits \[2, 48\]"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"real_vocab_size": V + 1}, "real_vocab_size is 49; the logits have 48 columns"),
        ({"real_vocab_size": 0}, "real_vocab_size is 0"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0; it must be positive"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(**{"logits": torch.zeros(2, V), "targets": torch.tensor([0, 1]), **changes})


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_for_it():
    for dtype, temperature, real_vocab_size in CASES:
        logits, targets, grad = (tensor.to(DEVICE) for tensor in draw(dtype, real_vocab_size))
        if ON_CARD:  # a CPU looks at its targets, and refuses this one
            targets[0, 0] = real_vocab_size
        leaf = logits.clone().requires_grad_()
        with no_waiting():
            logprobs = vocab_parallel_logprobs(
                leaf, targets, temperature=temperature, real_vocab_size=real_vocab_size, chunk_bytes=700
            )
            logprobs.backward(grad)
        assert logprobs.isnan().nonzero().tolist() == [[0, 0]] * ON_CARD
        expected, _ = reference(logits[0, 1:], targets[0, 1:], grad[0, 1:], temperature, real_vocab_size)
        torch.testing.assert_close(logprobs[0, 1:].double(), expected, rtol=0, atol=VALUE_ERROR[dtype])
