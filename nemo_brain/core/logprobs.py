"""Token log-probs from vocabulary-parallel logits, without the softmax of a whole sequence in memory.

Shapes: P positions (all leading dimensions of the logits), C positions of a chunk, V this rank's vocabulary shard,
R <= V its real columns (the others pad the vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    real_vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """log softmax(logits / temperature) at the targets, in nats.

    Two collectives forward (a maximum, a sum), none backward. Beyond the logits, which are kept by reference and left
    untouched, memory is a few numbers per position, one chunk of positions in the accumulation dtype and, backward, the
    gradient. Logits whose leading dimensions cannot be viewed as one are copied.

    Args:
        logits: [..., V] of any float dtype: this rank's shard; shards have equal sizes and lie in rank order.
        targets: [...] global token ids, integers, the same on all ranks of the group.
        tp_group: the tensor-parallel group; None for a vocabulary that is not split.
        temperature: divides the logits: 1 for log p and log q, the sampling temperature for log q'.
        real_vocab_size: columns from this global index on are padding: no probability, zero gradient.
        chunk_bytes: the size of a chunk; a chunk has at least one position. None: 64 MiB on a GPU, 4 MiB on the CPU,
            whose caches hold that between one pass over a chunk and the next.

    Returns:
        [...] float32, or float64 for float64 logits; differentiable in the logits (once), in their dtype. Every rank of
        the group computes the whole loss from it, and backward gives the gradient of its own shard.

    Raises:
        ValueError: shapes that disagree; a temperature, vocabulary size or chunk size out of range; on the CPU, a
            target outside the vocabulary. On a GPU that last check would wait for the device: the log-prob is NaN.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets are {list(targets.shape)} for logits {list(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if chunk_bytes is None:
        chunk_bytes = 2**22 if logits.device.type == "cpu" else 2**26
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be positive")
    shard = vocabulary_shard(targets, logits.shape[-1], tp_group, real_vocab_size)
    logprobs = _TargetLogProbs.apply(
        logits, shard.targets, shard.group, shard.real_columns, 1.0 / temperature, chunk_bytes
    )
    return logprobs if targets.device.type == "cpu" else logprobs.masked_fill(~shard.valid, torch.nan)


class VocabularyShard(NamedTuple):
    """A rank's share of the vocabulary: ``targets`` less its first column, which targets are tokens at all, its number
    of real columns, and the group to reduce over (None: there are no other ranks)."""

    targets: torch.Tensor
    valid: torch.Tensor
    real_columns: int
    group: dist.ProcessGroup | None


def vocabulary_shard(
    targets: torch.Tensor, columns: int, tp_group: dist.ProcessGroup | None, real_vocab_size: int | None
) -> VocabularyShard:
    """This rank's shard of ``columns`` columns; ValueError as in ``vocab_parallel_logprobs``."""
    ranks, rank = (1, 0) if tp_group is None else (dist.get_world_size(tp_group), dist.get_rank(tp_group))
    vocab_size = columns * ranks if real_vocab_size is None else real_vocab_size
    if not 0 < vocab_size <= columns * ranks:
        raise ValueError(f"real_vocab_size is {vocab_size}; the logits have {columns * ranks} columns")
    valid = (targets >= 0) & (targets < vocab_size)
    if targets.device.type == "cpu" and not valid.all():
        raise ValueError(f"target {targets[~valid][0].item()} is outside the vocabulary of {vocab_size} tokens")
    return VocabularyShard(
        targets=targets.long() - rank * columns,
        valid=valid,
        real_columns=min(max(vocab_size - rank * columns, 0), columns),
        group=tp_group if ranks > 1 else None,
    )


class _TargetLogProbs(torch.autograd.Function):
    """The log-probs of local target indices; an index outside [0, R) belongs to another rank's shard."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        local_targets: torch.Tensor,
        group: dist.ProcessGroup | None,
        real_columns: int,
        scale: float,
        chunk_bytes: int,
    ) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits_PR = logits.reshape(-1, logits.shape[-1])[:, :real_columns]
        targets_P = local_targets.reshape(-1)
        chunk = max(1, chunk_bytes // (logits.shape[-1] * dtype.itemsize))
        positions = targets_P.numel()

        max_P = logits_PR.new_full((positions,), -torch.inf, dtype=dtype)
        if real_columns:  # a shard that is all padding has no maximum of its own
            max_P.copy_(logits_PR.amax(-1)).mul_(scale)
        if group is not None:
            dist.all_reduce(max_P, op=dist.ReduceOp.MAX, group=group)

        # The exponentials' sum and the target's logit, both less the maximum, in one collective.
        sums_2P = logits_PR.new_zeros((2, positions), dtype=dtype)
        for part, shifted_CR in _shifted_chunks(logits_PR, max_P, scale, chunk):
            local_C1, mine_C = locate(targets_P[part], real_columns)
            sums_2P[1, part] = torch.where(mine_C, shifted_CR.gather(1, local_C1).squeeze(1), 0.0)
            sums_2P[0, part] = shifted_CR.exp_().sum(-1)
        if group is not None:
            dist.all_reduce(sums_2P, op=dist.ReduceOp.SUM, group=group)

        log_sum_P = sums_2P[0].log()
        ctx.save_for_backward(logits, targets_P, max_P, sums_2P[0])
        ctx.real_columns, ctx.scale, ctx.chunk = real_columns, scale, chunk
        return (sums_2P[1] - log_sum_P).view(local_targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets_P, max_P, sum_P = ctx.saved_tensors
        logits_PR = logits.reshape(-1, logits.shape[-1])[:, : ctx.real_columns]
        # d log p(target) / d logit = scale (1[target] - p), from this rank's columns and the two sums alone.
        grad_P = grad.reshape(-1) * ctx.scale
        out_PV = logits.new_empty((targets_P.numel(), logits.shape[-1]))
        out_PV[:, ctx.real_columns :] = 0
        for part, shifted_CR in _shifted_chunks(logits_PR, max_P, ctx.scale, ctx.chunk):
            local_C1, mine_C = locate(targets_P[part], ctx.real_columns)
            grad_CR = shifted_CR.exp_().mul_((-grad_P[part] / sum_P[part])[:, None])
            grad_CR.scatter_add_(1, local_C1, torch.where(mine_C, grad_P[part], 0.0)[:, None])
            out_PV[part, : ctx.real_columns] = grad_CR
        return out_PV.view(logits.shape), None, None, None, None, None


def _shifted_chunks(
    logits_PR: torch.Tensor, max_P: torch.Tensor, scale: float, chunk: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """scale * logits - max for ``chunk`` positions at a time, in the maximum's dtype; nothing if R is zero.

    The chunks share one buffer, which the caller may overwrite: two of them never live at a time.
    """
    buffer_CR = max_P.new_empty((min(chunk, len(max_P)), logits_PR.shape[1]))
    for start in range(0, len(max_P) if logits_PR.shape[1] else 0, chunk):
        part = slice(start, start + chunk)
        shifted_CR = buffer_CR[: len(max_P[part])]
        if scale == 1.0 and logits_PR.dtype == shifted_CR.dtype:
            # The same numbers in one pass over memory. Of other dtypes it would cast a whole chunk to another buffer.
            torch.sub(logits_PR[part], max_P[part, None], out=shifted_CR)
        else:
            shifted_CR.copy_(logits_PR[part])
            (shifted_CR if scale == 1.0 else shifted_CR.mul_(scale)).sub_(max_P[part, None])
        yield part, shifted_CR


def locate(targets_C: torch.Tensor, real_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column indices [C, 1] that are always valid, and which of them [C] are this shard's own targets."""
    mine_C = (targets_C >= 0) & (targets_C < real_columns)
    return targets_C.clamp(0, real_columns - 1)[:, None], mine_C
