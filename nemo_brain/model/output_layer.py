"""The output layer and the targets' log-probs in one: the logits of a row never exist as a whole.

Shapes: T positions with a target, H hidden, V this rank's vocabulary shard, R <= V its real columns (the others pad the
vocabulary), C columns of a chunk, E temperatures.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemo_brain.core.first_use import working
from nemo_brain.core.logprobs import locate, vocabulary_shard

# The logits of so many bytes exist at a time: enough for products at full speed on a CPU, and on a card most of it.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}
_SHARE_OF_FREE = 8  # never more than 1 / 8 of a card's free memory: up to three chunks exist at a time, without Triton
_ALIGNED = 256  # columns: products of other widths take slow kernels on a card


def linear_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    real_vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature) at the targets, in nats, for each temperature.

    Logits are made a chunk of columns at a time and reduced at once to a running maximum and sum; backward makes them
    again, but for those of the last chunk, which are kept. So each block of the weight's gradient is written once, and
    only the hidden states' gradient is added up over the chunks. Two collectives forward (a maximum, a sum), one
    backward (the hidden states' gradient).

    Args:
        hidden_TH: the same on all ranks of the group.
        weight_VH: this rank's rows of the output layer's weight; shards have equal sizes and lie in rank order.
        targets_T, tp_group, real_vocab_size: as in ``logprobs.vocab_parallel_logprobs``.
        temperatures: divide the logits.
        chunk_bytes: of the chunk's logits in the accumulation dtype; a chunk has at least one column. None: 32 MiB on a
            CPU, 512 MiB on a GPU. There it is never more than an eighth of what is free.

    Returns:
        [E, T] float32, or float64 for float64 weights; differentiable (once) in the hidden states, with their whole
        gradient on every rank, and in the weight.

    Raises:
        ValueError: as ``logprobs.vocab_parallel_logprobs``.
    """
    if targets_T.shape != hidden_TH.shape[:-1] or hidden_TH.shape[-1:] != weight_VH.shape[1:]:
        shapes = [list(tensor.shape) for tensor in (hidden_TH, weight_VH, targets_T)]
        raise ValueError(f"hidden states, weight and targets have shapes {shapes}; they must be [T, H], [V, H] and [T]")
    if not temperatures or not min(temperatures) > 0:
        raise ValueError(f"temperatures are {temperatures}; they must be positive")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be positive")
    chunk_bytes = _budget(hidden_TH.device, chunk_bytes)
    shard = vocabulary_shard(targets_T, len(weight_VH), tp_group, real_vocab_size)
    scales = tuple(1 / temperature for temperature in temperatures)
    logprobs_ET = _LinearLogProbs.apply(
        hidden_TH, weight_VH, shard.targets, shard.group, shard.real_columns, scales, chunk_bytes
    )
    return logprobs_ET if targets_T.device.type == "cpu" else logprobs_ET.masked_fill(~shard.valid, torch.nan)


class _LinearLogProbs(torch.autograd.Function):
    """The log-probs of local target indices; an index outside [0, R) belongs to another rank's shard."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        group: dist.ProcessGroup | None,
        real_columns: int,
        scales: tuple[float, ...],
        chunk_bytes: int,
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        chunks = _chunks(real_columns, chunk_bytes // max(1, len(targets_T) * dtype.itemsize))
        kernels = _kernels(hidden_TH.device, dtype)
        max_T = hidden_TH.new_full(targets_T.shape, -torch.inf, dtype=dtype)  # of this rank's logits so far
        sums_ET = max_T.new_zeros(len(scales), len(targets_T))  # of exp(scale * (logit - max_T))
        target_T = torch.zeros_like(max_T)  # the target's logit, on the rank that has it
        scale_E1 = torch.cat([max_T.new_full((1, 1), scale) for scale in scales])  # a copy from the host would wait
        logits_TC = None
        for part in chunks:
            logits_TC = None  # one chunk's at a time
            logits_TC = _product(hidden_TH, weight_VH[part].T)
            if kernels is not None:
                kernels.add_chunk(logits_TC, targets_T, part.start, scale_E1[:, 0], max_T, sums_ET, target_T)
            else:
                _add_chunk(logits_TC, targets_T - part.start, scales, scale_E1, max_T, sums_ET, target_T)
        local_max_T = max_T
        if group is not None:
            max_T = local_max_T.clone()
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
            sums_ET *= (scale_E1 * (local_max_T - max_T)).exp()
        _, mine_T = locate(targets_T, real_columns)
        totals = torch.cat([sums_ET, torch.where(mine_T, target_T - max_T, 0.0)[None]])
        if group is not None:
            dist.all_reduce(totals, op=dist.ReduceOp.SUM, group=group)
        sums_ET, shifted_target_T = totals[:-1], totals[-1]
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, max_T, sums_ET, scale_E1)
        ctx.group, ctx.scales, ctx.chunks, ctx.kernels = group, scales, chunks, kernels
        # The last chunk's need not be made again; one temperature is all that is ever trained with.
        ctx.kept = (logits_TC, local_max_T) if len(scales) == 1 else None
        return scale_E1 * shifted_target_T - sums_ET.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ET: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, _, max_T, *_ = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # Summed over the chunks in the accumulation dtype.
        grad_hidden_TH: Any = torch.zeros_like(hidden_TH, dtype=max_T.dtype) if needs_hidden else None
        grad_weight_VH: Any = torch.zeros_like(weight_VH) if needs_weight else None
        for part in reversed(ctx.chunks):  # the kept chunk first, so that its memory serves the others
            grad_TC = _logit_gradient(ctx, part, grad_ET)
            if needs_weight:
                torch.mm(grad_TC.T, hidden_TH, out=grad_weight_VH[part])
            if needs_hidden:
                _add_product(grad_hidden_TH, grad_TC, weight_VH[part])
            del grad_TC  # one chunk's at a time
        if needs_hidden:
            if ctx.group is not None:
                dist.all_reduce(grad_hidden_TH, group=ctx.group)
            grad_hidden_TH = grad_hidden_TH.to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _add_chunk(
    logits_TC: torch.Tensor,
    targets_T: torch.Tensor,
    scales: tuple[float, ...],
    scale_E1: torch.Tensor,
    max_T: torch.Tensor,
    sums_ET: torch.Tensor,
    target_T: torch.Tensor,
) -> None:
    """Adds a chunk's columns to what is known of those before, in place; the logits become exps of the last scale."""
    column_T1, here_T = locate(targets_T, logits_TC.shape[1])
    target_T += torch.where(here_T, logits_TC.gather(1, column_T1)[:, 0], 0.0)
    higher_T = torch.maximum(max_T, logits_TC.amax(-1))
    sums_ET *= (scale_E1 * (max_T - higher_T)).exp()
    max_T.copy_(higher_T)
    for e, exps_TC in enumerate(_exps(logits_TC.sub_(max_T[:, None]), scales)):
        sums_ET[e] += exps_TC.sum(-1)


def _logit_gradient(ctx: Any, part: slice, grad_ET: torch.Tensor) -> torch.Tensor:
    """[T, C] in the weight's dtype: sum over the temperatures of grad * scale * (1[target] - p)."""
    hidden_TH, weight_VH, targets_T, max_T, sums_ET, scale_E1 = ctx.saved_tensors
    kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward makes it again
    logits_TC = _product(hidden_TH, weight_VH[part].T) if kept is None else kept[0]
    if ctx.kernels is not None:
        gradient_TC: torch.Tensor = ctx.kernels.logit_gradient(
            logits_TC, targets_T, part.start, scale_E1[:, 0], max_T, sums_ET, grad_ET, weight_VH.dtype
        )
        return gradient_TC
    exps: Iterable[torch.Tensor]
    if kept is None:
        exps = _exps(logits_TC.sub_(max_T[:, None]), ctx.scales)
    else:
        # They are exps less this rank's maximum, the sums are less that of all ranks.
        exps = [logits_TC.mul_((scale_E1[0] * (kept[1] - max_T)).exp()[:, None])]
    column_T1, here_T = locate(targets_T - part.start, part.stop - part.start)
    total_TC: Any = None
    for e, exps_TC in enumerate(exps):
        grad_T = grad_ET[e] * ctx.scales[e]
        term_TC = exps_TC.mul_((-grad_T / sums_ET[e])[:, None])
        term_TC.scatter_add_(1, column_T1, torch.where(here_T, grad_T, 0.0)[:, None])
        total_TC = term_TC if total_TC is None else total_TC.add_(term_TC)
    gradient_TC = total_TC.to(weight_VH.dtype)
    return gradient_TC


def _exps(shifted_TC: torch.Tensor, scales: tuple[float, ...]) -> Iterator[torch.Tensor]:
    """exp(scale * shifted) for one scale after the other; the last one overwrites its argument."""
    for scale in scales[:-1]:
        yield (shifted_TC * scale).exp_()
    yield shifted_TC.mul_(scales[-1]).exp_()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in the accumulation dtype: what half-precision products are accumulated in is not rounded, with CUDA."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; the total is in the accumulation dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b)


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """``output_kernels`` on a card where they work, for logits in float32; otherwise None, with a warning there."""
    if device.type != "cuda" or dtype != torch.float32:
        return None
    otherwise = "the output layer's log-probs go by many passes over the logits"
    return working("nemo_brain.model.output_kernels", lambda kernels: kernels.problem(device), otherwise)


def _budget(device: torch.device, wanted: int | None) -> int:
    """Bytes of a chunk; ``wanted`` None: the device's own."""
    if device.type != "cuda":
        return wanted or _CHUNK_BYTES["cpu"]
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own
    return min(wanted or _CHUNK_BYTES["cuda"], free // _SHARE_OF_FREE)


def _chunks(columns: int, size: int) -> list[slice]:
    """Slices of at most ``size`` columns, about even, at least one column each; aligned where they are wide enough."""
    count = -(-columns // max(1, size))
    width = -(-columns // max(1, count))
    if size >= _ALIGNED:
        width = min(-(-width // _ALIGNED), size // _ALIGNED) * _ALIGNED
    return [slice(start, min(start + width, columns)) for start in range(0, columns, max(1, width))]
