"""The output layer and the targets' log-probs in one: the logits of a row never exist as a whole.

Shapes: T positions with a target, C positions of a chunk, H hidden, V this rank's vocabulary shard, R <= V its real
columns (the others pad the vocabulary), E temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemo_brain.logprobs import locate, vocabulary_shard

# The logits of this many bytes exist at a time. Large enough that the matrix products run at full speed.
CHUNK_BYTES = 2**26


def linear_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    tp_group: dist.ProcessGroup | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    real_vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature) at the targets, in nats, for each temperature.

    Logits are made a chunk of positions at a time and reduced at once; backward makes them again, but for those of the
    last chunk, which are kept. Two collectives forward whatever the number of chunks (a maximum, a sum); backward the
    sum of the hidden states' gradient, chunk by chunk, behind the weight's gradient.

    Args:
        hidden_TH: the same on all ranks of the group.
        weight_VH: this rank's rows of the output layer's weight; shards have equal sizes and lie in rank order.
        targets_T, tp_group, real_vocab_size: as in ``logprobs.vocab_parallel_logprobs``.
        temperatures: divide the logits.
        chunk_bytes: of the chunk's logits in the accumulation dtype; a chunk has at least one position.

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
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be positive")
    shard = vocabulary_shard(targets_T, len(weight_VH), tp_group, real_vocab_size)
    scales = tuple(1 / temperature for temperature in temperatures)
    logprobs_ET = _LinearLogProbs.apply(
        hidden_TH, weight_VH, shard.targets, shard.group, shard.real_columns, scales, chunk_bytes
    )
    return logprobs_ET if targets_T.device.type == "cpu" else logprobs_ET.masked_fill(~shard.valid, torch.nan)


class _LinearLogProbs(torch.autograd.Function):
    """The log-probs of local target indices; an index outside [0, R) belongs to another rank's shard."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T, group, real_columns, scales, chunk_bytes):
        weight_RH = weight_VH[:real_columns]
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        chunks = _chunks(len(targets_T), chunk_bytes // (len(weight_VH) * dtype.itemsize))
        max_T = hidden_TH.new_full(targets_T.shape, -torch.inf, dtype=dtype)  # of this rank's logits
        sums_ET = max_T.new_zeros(len(scales), len(targets_T))  # of exp(scale * (logit - max_T))
        target_T = torch.zeros_like(max_T)  # the target's logit ...
        mine_T = torch.zeros_like(max_T)  # ... on the rank that has it
        exps_CR = None
        for part in chunks if real_columns else ():
            exps_CR = None  # one chunk's at a time
            logits_CR = _product(hidden_TH[part], weight_RH.T)
            column_C1, mine_C = locate(targets_T[part], real_columns)
            mine_T[part] = mine_C.to(dtype)
            target_T[part] = torch.where(mine_C, logits_CR.gather(1, column_C1)[:, 0], 0.0)
            max_T[part] = logits_CR.amax(-1)
            for e, exps_CR in enumerate(_exps(logits_CR.sub_(max_T[part, None]), scales)):
                sums_ET[e, part] = exps_CR.sum(-1)
        scale_E1 = max_T.new_tensor(scales)[:, None]
        local_max_T = max_T
        if group is not None:
            max_T = local_max_T.clone()
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
            sums_ET *= (scale_E1 * (local_max_T - max_T)).exp()
        totals = torch.cat([sums_ET, ((target_T - max_T) * mine_T)[None]])
        if group is not None:
            dist.all_reduce(totals, op=dist.ReduceOp.SUM, group=group)
        sums_ET, shifted_target_T = totals[:-1], totals[-1]
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, max_T, sums_ET)
        ctx.group, ctx.real_columns, ctx.scales, ctx.chunks = group, real_columns, scales, chunks
        # The last chunk's need not be made again; one temperature is all that is ever trained with.
        ctx.kept = (exps_CR, local_max_T) if len(scales) == 1 else None
        return scale_E1 * shifted_target_T - sums_ET.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ET):
        hidden_TH, weight_VH, targets_T, max_T, sums_ET = ctx.saved_tensors
        weight_RH = weight_VH[: ctx.real_columns]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        # Summed over the chunks in the accumulation dtype.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=max_T.dtype) if needs_weight else None
        running = []
        for part in reversed(ctx.chunks):  # the kept chunk first, so that its memory serves the others
            grad_CR = None
            if ctx.real_columns:
                grad_CR = _logit_gradient(ctx, part, hidden_TH, weight_RH, targets_T, max_T, sums_ET, grad_ET)
                grad_CR = grad_CR.to(weight_VH.dtype)
            if needs_hidden:
                if ctx.real_columns:
                    torch.mm(grad_CR, weight_RH, out=grad_hidden_TH[part])
                if ctx.group is not None:
                    running.append(dist.all_reduce(grad_hidden_TH[part], group=ctx.group, async_op=True))
            if needs_weight and ctx.real_columns:
                _add_product(grad_weight_VH[: ctx.real_columns], grad_CR.T, hidden_TH[part])
        for work in running:
            work.wait()
        if needs_weight:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _logit_gradient(ctx, part, hidden_TH, weight_RH, targets_T, max_T, sums_ET, grad_ET) -> torch.Tensor:
    """[C, R]: sum over the temperatures of grad * scale * (1[target] - p)."""
    if ctx.kept is not None:
        (exps_CR, local_max_T), ctx.kept = ctx.kept, None  # overwritten below: a second backward makes it again
        # It is less this rank's maximum, the sums are less that of all ranks.
        exps_CR *= (ctx.scales[0] * (local_max_T[part] - max_T[part])).exp()[:, None]
        exps = [exps_CR]
    else:
        exps = _exps(_product(hidden_TH[part], weight_RH.T).sub_(max_T[part, None]), ctx.scales)
    column_C1, mine_C = locate(targets_T[part], ctx.real_columns)
    total_CR = None
    for e, exps_CR in enumerate(exps):
        grad_C = grad_ET[e, part] * ctx.scales[e]
        term_CR = exps_CR.mul_((-grad_C / sums_ET[e, part])[:, None])
        term_CR.scatter_add_(1, column_C1, torch.where(mine_C, grad_C, 0.0)[:, None])
        total_CR = term_CR if total_CR is None else total_CR.add_(term_CR)
    return total_CR


def _exps(shifted_CR: torch.Tensor, scales: tuple[float, ...]) -> Iterator[torch.Tensor]:
    """exp(scale * shifted) for one scale after the other; the last one overwrites its argument."""
    for scale in scales[:-1]:
        yield (shifted_CR * scale).exp_()
    # A scale of one changes no number, but takes a pass over memory.
    yield (shifted_CR if scales[-1] == 1.0 else shifted_CR.mul_(scales[-1])).exp_()


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


def _chunks(positions: int, size: int) -> list[slice]:
    """Even slices of at most ``size`` positions, at least one position each."""
    count = -(-positions // max(1, size))
    return [slice(i * positions // count, (i + 1) * positions // count) for i in range(count)]
