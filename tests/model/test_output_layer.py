"""The fused output layer against float64 log_softmax of all logits: values, gradients, collectives, memory.

Shapes: T positions, H hidden, V vocabulary (whole, or a rank's shard).
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cards import DEVICE, no_waiting
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from nemo_brain.core.logprobs import vocab_parallel_logprobs
from nemo_brain.model import output_layer
from nemo_brain.model.output_layer import linear_logprobs

T, H, V = 11, 6, 48
CASES = [
    # dtype, temperatures, real vocabulary; 25 of 48 leaves a shard of one real column at TP 2, an empty one at TP 4
    (torch.float64, (1.0,), V),
    (torch.float64, (1.0, 0.7, 1.3), 41),
    (torch.float32, (1.0,), 25),
    (torch.float32, (0.7,), V),
    (torch.float32, (1.0, 1.3), 25),
    (torch.bfloat16, (1.0,), 41),
]
# float32 rounds each operation by 6e-8, of logits up to tens; bfloat16 by 2e-3 to 4e-3: the logits themselves on a CPU,
# and the gradients' factors.
ERROR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15}
CHUNKS = (1, 700, 2**20)  # bytes: a position, a few (not a divisor of T), all of them


def draw(dtype: torch.dtype, real_vocab_size: int, temperatures: int):
    """Hidden states, weight (enormous where it is padding), targets, and the loss's gradient [E, T]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = (2 * torch.randn(V, H, generator=generator)).to(dtype)
    weight[real_vocab_size:] = 1e4
    targets = torch.randint(real_vocab_size, (T,), generator=generator)
    return hidden, weight, targets, torch.randn(temperatures, T, generator=generator)


def reference(hidden, weight, targets, grad, temperatures, real_vocab_size):
    """Log-probs and both gradients by torch's own log_softmax, in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = (hidden @ weight.T)[:, :real_vocab_size]
    logprobs = torch.stack(
        [(logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0] for temperature in temperatures]
    )
    (logprobs * grad).sum().backward()
    return logprobs.detach(), hidden.grad, weight.grad


def _check(group, ranks: int, rank: int, kernels: bool) -> None:
    rows = slice(rank * V // ranks, (rank + 1) * V // ranks)
    if kernels:
        output_kernels = pytest.importorskip("nemo_brain.model.output_kernels")
        output_layer._kernels = lambda device, dtype: output_kernels if dtype == torch.float32 else None
    for dtype, temperatures, real in CASES:
        hidden, weight, targets, grad = draw(dtype, real, len(temperatures))
        expected = reference(hidden, weight, targets, grad, temperatures, real)
        for chunk_bytes in CHUNKS[1:] if kernels else CHUNKS:
            ours = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
            logprobs = linear_logprobs(*ours, targets, group, temperatures, real, chunk_bytes)
            assert logprobs.dtype == torch.promote_types(dtype, torch.float32)
            (logprobs * grad).sum().backward(retain_graph=True)
            first = [tensor.grad.clone() for tensor in ours]
            assert [g.dtype for g in first] == [dtype, dtype]
            for found, theirs in zip((logprobs, *first), (expected[0], expected[1], expected[2][rows]), strict=True):
                scale = max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(found.double(), theirs, atol=ERROR[dtype] * scale, rtol=0)
            assert not first[1][max(0, real - rows.start) :].any(), "padding has a gradient"
            # The first backward overwrites what the forward kept; a second one must not notice.
            (logprobs * grad).sum().backward()
            for tensor, once in zip(ours, first, strict=True):
                torch.testing.assert_close(
                    tensor.grad, 2 * once, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
                )


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "Triton"])
def test_one_rank_without_a_group(kernels, monkeypatch):
    monkeypatch.setattr(output_layer, "_kernels", output_layer._kernels)
    _check(None, 1, 0, kernels)


def _with_group(kernels):
    dist.init_process_group("gloo", init_method="env://")
    try:
        _check(dist.group.WORLD, dist.get_world_size(), dist.get_rank(), kernels)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "Triton"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_ranks(ranks, kernels):
    run_ranks(_with_group, ranks, kernels)


def test_frozen_weight_or_hidden_states():
    hidden, weight, targets, grad = draw(torch.float32, V, 1)
    full = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    (linear_logprobs(*full, targets) * grad).sum().backward()
    for index in range(2):
        parts = [hidden.clone(), weight.clone()]
        parts[index].requires_grad_()
        (linear_logprobs(*parts, targets) * grad).sum().backward()
        assert torch.equal(parts[index].grad, full[index].grad)


def test_no_targets():
    hidden, weight, *_ = draw(torch.float32, V, 1)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = linear_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == (1, 0)
    logprobs.sum().backward()
    assert not weight.grad.any()


def test_nothing_hides_a_broken_hidden_state():
    hidden, weight, targets, _ = draw(torch.float32, V, 1)
    hidden[3, 2] = torch.nan
    logprobs = linear_logprobs(hidden, weight, targets)[0]
    assert logprobs.isnan().tolist() == [t == 3 for t in range(T)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_T": torch.full((T,), V)}, "target 48 is outside the vocabulary of 48 tokens"),
        ({"targets_T": torch.zeros(T - 1, dtype=torch.int64)}, "shapes"),
        ({"weight_VH": torch.zeros(V, H + 1)}, "shapes"),
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (1.0, 0.0)}, "temperatures"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"real_vocab_size": V + 1}, "real_vocab_size is 49"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    hidden, weight, targets, _ = draw(torch.float32, V, 1)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{"hidden_TH": hidden, "weight_VH": weight, "targets_T": targets, **change})


def _peak(work) -> int:
    """Bytes that are live at a time during ``work``, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_logits_never_exist_as_a_whole():
    """Forward and backward at a size where the logits are 64 MiB take a few chunks beside the gradients."""
    positions, hidden_size, vocabulary, chunk = 512, 16, 32768, 2**21
    hidden = torch.randn(positions, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets = torch.randint(vocabulary, (positions,))
    logits = positions * vocabulary * 4

    fused = _peak(lambda: linear_logprobs(hidden, weight, targets, chunk_bytes=chunk).sum().backward())
    gradients = 4 * hidden_size * (positions + vocabulary)
    assert fused < gradients + 3 * chunk < logits / 7
    # The measure sees logits where there are any.
    assert _peak(lambda: vocab_parallel_logprobs(hidden @ weight.T, targets).sum().backward()) > 2 * logits


@pytest.mark.parametrize("columns", [0, 1, 255, 256, 258, 32064, 49152, 128256])
@pytest.mark.parametrize("size", [1, 100, 255, 256, 300, 1000, 8192, 10**6])
def test_chunks_cover_all_columns_once_and_are_aligned_where_they_can_be(columns, size):
    """Products whose width is no multiple of 256 take slow kernels on a card."""
    chunks = output_layer._chunks(columns, size)
    assert [i for part in chunks for i in range(part.start, part.stop)] == list(range(columns))
    widths = [part.stop - part.start for part in chunks]
    assert all(0 < width <= size for width in widths)
    if size >= 256:
        assert all(width % 256 == 0 for width in widths[:-1])
        assert len(chunks) <= -(-columns // (size // 256 * 256))
    else:
        assert len(chunks) == -(-columns // size)


@pytest.mark.parametrize(
    ("free", "wanted", "expected"),
    [
        (80 * 2**30, None, 2**29),
        (2**31, None, 2**28),
        (2**24, None, 2**21),
        (80 * 2**30, 2**30, 2**30),
        (2**31, 2**30, 2**28),
        (2**31, 2**20, 2**20),
    ],
)
def test_a_cards_chunk_is_a_share_of_what_is_free(monkeypatch, free, wanted, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 2**19, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**19)
    assert output_layer._budget(torch.device("cuda"), wanted) == expected
    assert output_layer._budget(torch.device("cpu"), None) == 2**25


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-3)])
def test_on_a_gpu_a_large_vocabulary_equals_float64(dtype, bound):
    """In several chunks, the last of another width. fp32: as above; bf16: its products give fp32 logits there, and the
    sum over the vocabulary is fp32's."""
    generator = torch.Generator().manual_seed(0)
    vocab, real, positions, width = 5120, 5000, 64, 128
    hidden = torch.randn(positions, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocab, width, generator=generator)).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(real, (positions,), generator=generator).to(DEVICE)
    grad = torch.randn(2, positions, generator=generator).to(DEVICE)
    expected = reference(hidden, weight, targets, grad, (1.0, 0.7), real)
    chunk_bytes = 4 * positions * 1024
    linear_logprobs(hidden, weight, targets, None, (1.0, 0.7), real, chunk_bytes)  # what is made at the first use
    with no_waiting():
        logprobs = linear_logprobs(hidden, weight, targets, None, (1.0, 0.7), real, chunk_bytes)
        (logprobs * grad).sum().backward()
    on_cpu = 10 * bound if DEVICE.type == "cpu" and dtype == torch.bfloat16 else bound  # where logits are bf16 too
    torch.testing.assert_close(logprobs.double(), expected[0], atol=on_cpu, rtol=0)
    for found, theirs in zip((hidden.grad, weight.grad), expected[1:], strict=True):
        # Rounded once more, to the gradient's dtype.
        last = 2**-8 if dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(found.double(), theirs, atol=5 * last * theirs.abs().max().item(), rtol=0)
