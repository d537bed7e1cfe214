"""Drawing tokens: keyed uniform numbers, and the inverse of the cumulative distribution over a split vocabulary.

Shapes: R rows (outputs in flight), V vocabulary columns of this rank, B blocks of W columns.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_brain.core.first_use import working

_BLOCK = 512  # columns (W) whose probabilities are added up before any of them is looked at
# Of logits that are exponentiated at a time, so that no copy of all of them exists: what a CPU's caches hold; on a card
# so much that the number of launches does not grow with the rows, below a thousand of them.
_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**29}


def uniforms(seed: int, iteration: int, prompt_id: str, output: int, positions: int) -> np.ndarray:
    """The draws of one output: [positions] float64 strictly between 0 and 1, by splitmix64 from a hashed key."""
    key = hashlib.blake2b(f"{seed}\x1f{iteration}\x1f{output}\x1f{prompt_id}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.uint64(int.from_bytes(key, "little")) + np.arange(1, positions + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw_tokens(
    logits_RV: torch.Tensor,
    uniforms_R: torch.Tensor,
    real_vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverse transform: the first token whose cumulative probability exceeds the draw.

    Args:
        logits_RV: this rank's vocabulary columns.
        uniforms_R: float64 in (0, 1), the same on every rank of ``group``.
        real_vocab_size: columns from there on are padding and are never drawn.
        group: the tensor-parallel group (None: one rank holds all columns).
        temperature: divides the logits.

    Returns:
        int64 token ids [R] and their log-probs [R] (float64, nats), the same on every rank. A row whose logits are no
        law, because one is NaN or +inf or all are -inf, has the token -1.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    start = rank * logits_RV.shape[-1]
    real = max(0, min(logits_RV.shape[-1], real_vocab_size - start))
    kernels = _kernels(logits_RV.device)
    if group is None and kernels is not None:
        alone: tuple[torch.Tensor, torch.Tensor] = kernels.draw(logits_RV[:, :real], uniforms_R, temperature, _BLOCK)
        return alone
    peak_R = torch.full_like(uniforms_R, float("-inf"))
    total_R = torch.zeros_like(uniforms_R)
    if real:
        logits_RV = logits_RV[:, :real]
        peak_R, least_R, sums_RB = _masses(logits_RV, temperature, kernels)
        ends_RB = sums_RB.cumsum(dim=-1)
        total_R = ends_RB[:, -1]
    shares = gather(torch.stack([peak_R, total_R]), group)  # [ranks, 2, R]
    top_R = shares[:, 0].amax(dim=0)
    masses = shares[:, 1] * (shares[:, 0] - top_R).exp()  # [ranks, R], in units of exp(top)
    edges = torch.cat([torch.zeros_like(masses[:1]), masses.cumsum(dim=0)])  # where the ranks' intervals meet
    before_R, after_R, mass_R = edges[rank], edges[rank + 1], edges[-1]
    draw_R = torch.minimum(uniforms_R * mass_R, _below(mass_R))
    drawn_2R = torch.stack([torch.full_like(draw_R, -1), torch.full_like(draw_R, float("-inf"))])
    if real:
        # No comparison with NaN holds, which is what a row without a law comes to.
        inside_R = (draw_R >= before_R) & (draw_R < after_R)
        # Rounding must not carry a draw past this rank's last token that has any probability.
        local_R = torch.minimum((draw_R - before_R) * (top_R - peak_R).exp(), _below(total_R))
        if kernels is None:
            columns_R = _search(logits_RV, least_R, temperature, ends_RB, local_R)
        else:
            columns_R = kernels.find_columns(logits_RV, least_R, temperature, ends_RB, local_R, _BLOCK)
        values_R = _scaled(logits_RV.gather(1, columns_R[:, None])[:, 0], temperature).double()
        found_2R = torch.stack([(start + columns_R).double(), values_R - top_R - mass_R.log()])
        drawn_2R = torch.where(inside_R, found_2R, drawn_2R)
    if ranks > 1:
        dist.all_reduce(drawn_2R, op=dist.ReduceOp.MAX, group=group)
    return drawn_2R[0].long(), drawn_2R[1]


@functools.cache
def _kernels(device: torch.device) -> Any:
    """``draw_kernels`` where they run and draw what the operations of this file draw, otherwise None."""
    if device.type != "cuda":
        return None

    def problem(kernels: Any) -> str | None:
        return None if agrees(kernels, device) else "Triton's kernels draw other tokens than they should"

    return working("nemo_brain.sampling.draw_kernels", problem, "tokens are drawn by many small operations")


def agrees(kernels: Any, device: torch.device) -> bool:
    """Whether kernels like ``draw_kernels`` give masses, columns and draws as the operations of this file do: those of
    some hundred draws, of which rounding may change one."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = (2 * torch.randn(256, 3 * _BLOCK + 7, generator=generator)).to(device)
    draws_R = torch.rand(256, generator=generator, dtype=torch.float64).to(device)
    found = []
    for chosen in (None, kernels):
        peak_R, least_R, sums_RB = _masses(logits_RV, 1.3, chosen)
        ends_RB = sums_RB.cumsum(dim=-1)
        search = _search if chosen is None else functools.partial(chosen.find_columns, block=_BLOCK)
        found.append((peak_R, ends_RB[:, -1], search(logits_RV, least_R, 1.3, ends_RB, draws_R * ends_RB[:, -1])))
    (peak, mass, columns), (peak_there, mass_there, columns_there) = found
    close = torch.allclose(peak, peak_there, rtol=1e-6) and torch.allclose(mass, mass_there, rtol=1e-5)
    tokens_R, logprobs_R = kernels.draw(logits_RV, draws_R, 1.3, _BLOCK)
    exact_R = (logits_RV.double() / 1.3).log_softmax(-1).gather(1, tokens_R.clamp(min=0)[:, None])[:, 0]
    close = close and torch.allclose(logprobs_R, exact_R, rtol=0, atol=1e-5)
    return close and max(int((columns != others).sum()) for others in (columns_there, tokens_R)) <= 1


def _masses(
    logits_RV: torch.Tensor, temperature: float, kernels: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's largest logit / temperature, the same but finite, and ``_block_sums`` less the latter."""
    if kernels is None:
        # In float32, as the logits are divided: the peak is then exactly the largest of them.
        peak_R = _scaled(logits_RV.amax(dim=-1), temperature).double()
    else:
        peaks_RB, parts_RB = kernels.block_masses(logits_RV, temperature, _BLOCK)
        peak_R = peaks_RB.amax(dim=-1).double()
    least_R = peak_R.clamp(min=torch.finfo(torch.float32).min)  # where all of this rank's logits are -inf
    if kernels is None:
        return peak_R, least_R, _block_sums(logits_RV, least_R, temperature)
    return peak_R, least_R, parts_RB.double() * (peaks_RB.double() - least_R[:, None]).exp()


def _block_sums(logits_RV: torch.Tensor, peak_R: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(logit / temperature - peak), added up over blocks of columns: [R, B] float64."""
    rows, columns = logits_RV.shape
    whole = columns // _BLOCK * _BLOCK
    sums_RB = peak_R.new_empty(rows, -(-columns // _BLOCK))
    chunk = max(1, _CHUNK_BYTES["cpu" if logits_RV.device.type == "cpu" else "cuda"] // (4 * columns))
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        weights = _weights(logits_RV[part], peak_R[part], temperature)
        sums_RB[part, : whole // _BLOCK] = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
        if whole < columns:
            sums_RB[part, -1] = weights[:, whole:].sum(-1)
    return sums_RB


def _weights(logits: torch.Tensor, peak_R: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(logit / temperature - peak) in float32."""
    return (_scaled(logits, temperature) - peak_R[:, None].float()).exp_()


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def _search(
    logits_RV: torch.Tensor, peak_R: torch.Tensor, temperature: float, ends_RB: torch.Tensor, local_R: torch.Tensor
) -> torch.Tensor:
    """The first column of each row whose cumulative weight exceeds ``local_R``: the block first, then within it."""
    last = logits_RV.shape[1] - 1
    block_R = torch.searchsorted(ends_RB, local_R[:, None], right=True)[:, 0].clamp(max=ends_RB.shape[1] - 1)
    end_R, before_R = (ends_RB.gather(1, index[:, None])[:, 0] for index in (block_R, (block_R - 1).clamp(min=0)))
    before_R = torch.where(block_R > 0, before_R, 0.0)
    columns_RW = block_R[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits_RV.device)
    weights_RW = _weights(logits_RV.gather(1, columns_RW.clamp(max=last)), peak_R, temperature)
    ends_RW = weights_RW.masked_fill_(columns_RW > last, 0.0).cumsum(dim=-1, dtype=torch.float64)
    # The block's sum was rounded to float32: the draw is taken as a fraction of it, of what its weights really add to.
    whole_R = ends_RW[:, -1]
    rest_R = torch.minimum((local_R - before_R) / (end_R - before_R) * whole_R, _below(whole_R)).clamp(min=0.0)
    columns_R = block_R * _BLOCK + torch.searchsorted(ends_RW, rest_R[:, None], right=True)[:, 0]
    return columns_R.clamp(max=last)  # only rows whose draw is another rank's go beyond


def _below(tensor: torch.Tensor) -> torch.Tensor:
    """The next smaller number of each (they are positive, or zero)."""
    return torch.nextafter(tensor, torch.zeros_like(tensor))


def gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's tensor, stacked in rank order; ``group`` None: this rank's alone."""
    if group is None:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def truncate(logits_RV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Columns outside top-k (0: all), then outside top-p (1: all), get probability zero."""
    if top_k:
        kth_R1 = logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, float("-inf"))
    if top_p < 1.0:
        ordered_RV, order_RV = logits_RV.sort(dim=-1, descending=True)
        probs_RV = ordered_RV.softmax(dim=-1)
        beyond_RV = probs_RV.cumsum(dim=-1) - probs_RV >= top_p
        logits_RV = logits_RV.masked_fill(torch.zeros_like(beyond_RV).scatter(1, order_RV, beyond_RV), float("-inf"))
    return logits_RV
