"""Our log-prob layers against Megatron's cross-entropy and torch's, with the memory that each needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from benchmarks import common, models
from nemo_brain.core.logprobs import vocab_parallel_logprobs
from nemo_brain.model.output_layer import linear_logprobs

TITLE = "Log-probs of targets"
_SHAPE = (4, 512)
_HIDDEN = 576
METHOD = f"""
Forward and backward for {_SHAPE[0]} x {_SHAPE[1]} positions. The first table starts from logits that exist.
Megatron's function overwrites them (each repeat gets a fresh copy, made off the clock), the others do not. Extra
memory is what exists at the peak beyond the logits and beyond their gradient, which every one of these functions must
return (Megatron's returns it in the memory of the overwritten logits, if they are fp32); the column before it
includes the gradient.

The second table starts from hidden states ({_HIDDEN} wide) and the output layer's weight, and includes the products
with it, forward and backward. `linear_logprobs` never holds the logits, so that its extra memory beyond the weight's
and hidden states' gradients replaces the logits, their gradient and everything else; it makes logits twice for that.

Extra memory counts the process's resident memory. One process, no tensor parallelism.
"""
MEMORY_TARGET, TIME_TARGET = 0.10, 1.2
_TARGET_VOCAB = 131072


def measure(smoke: bool) -> dict:
    vocabularies = [1024] if smoke else [50304, _TARGET_VOCAB]
    tables, targets = [], []
    for from_hidden in (False, True):
        rows = []
        for vocab in vocabularies:
            for dtype in ("float32", "bfloat16"):
                rows += _rows(vocab, dtype, from_hidden, 1 if smoke else 7)
        tables.append(rows)
    for row in [*tables[0], *tables[1]]:
        if row["case"] not in ("vocab_parallel_logprobs", "linear_logprobs") or row["vocab"] != vocabularies[-1]:
            continue
        where = f"{row['case']}, {_SHAPE[0]} x {_SHAPE[1]} x {row['vocab']}, {row['dtype']}"
        targets.append({"what": f"time / Megatron's: {where}", "value": row["time_ratio"], "at_most": TIME_TARGET})
        targets.append(
            {
                "what": f"extra memory / logits: {where}",
                "value": row["extra"] / row["logits"],
                "at_most": MEMORY_TARGET,
                "unit": "percent",
            }
        )
    columns = [
        ("vocab", "vocabulary", "count"),
        ("dtype", "dtype", "text"),
        ("case", "function", "text"),
        ("seconds", "seconds", "seconds"),
        ("time_ratio", "time / Megatron's", "ratio"),
        ("logits", "size of the logits", "bytes"),
        ("whole", "memory with gradients", "bytes"),
        ("extra", "extra memory", "bytes"),
        ("share", "extra / logits", "percent"),
    ]
    titles = ("From logits", "From hidden states, with the output layer")
    parts = [{"title": t, "columns": columns, "rows": rows} for t, rows in zip(titles, tables, strict=True)]
    return {"parts": parts, "targets": targets}


def _rows(vocab: int, dtype: str, from_hidden: bool, repeats: int) -> list[dict]:
    times, memory = common.fresh(_timed, vocab, dtype, from_hidden, repeats)
    itemsize = getattr(torch, dtype).itemsize
    logits = _SHAPE[0] * _SHAPE[1] * vocab * itemsize
    gradients = (_SHAPE[0] * _SHAPE[1] + vocab) * _HIDDEN * itemsize if from_hidden else logits
    rows = []
    for name in times:
        whole = memory[name]
        extra = max(0, whole - gradients)
        rows.append(
            {
                "vocab": vocab,
                "dtype": dtype,
                "case": name,
                "seconds": common.spread(times[name]),
                "time_ratio": common.ratio(times[name], next(iter(times.values()))),
                "logits": logits,
                "whole": whole,
                "extra": extra,
                "share": extra / logits,
            }
        )
    return rows


def profile(smoke: bool) -> list[dict]:
    """torch.profiler on each function at the larger vocabulary."""
    vocab = 1024 if smoke else _TARGET_VOCAB
    profiles = []
    for from_hidden in (False, True):
        for name in list(_cases(from_hidden))[: 1 if smoke else None]:
            for dtype in ("float32",) if smoke else ("float32", "bfloat16"):
                operations = common.fresh(_operations, name, vocab, dtype, from_hidden)
                profiles.append({"title": f"{name}, {vocab} columns, {dtype}", "operations": operations})
    return profiles


def _cases(from_hidden: bool) -> dict[str, Callable]:
    """Functions of (logits or hidden states, weight, targets) that return log-probs or losses; Megatron's first."""

    def megatron(logits, targets):
        return vocab_parallel_cross_entropy(logits, targets)

    def torch_log_softmax(logits, targets):
        return logits.float().log_softmax(-1).gather(-1, targets[..., None])

    def torch_cross_entropy(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")

    functions = {
        "megatron cross-entropy": megatron,
        "vocab_parallel_logprobs": vocab_parallel_logprobs,
        "torch log_softmax and gather": torch_log_softmax,
        "torch cross_entropy": torch_cross_entropy,
    }
    if not from_hidden:
        return {name: lambda logits, _, targets, f=f: f(logits, targets) for name, f in functions.items()}
    cases = {
        f"output layer, {name}": lambda hidden, weight, targets, f=f: f(hidden @ weight.T, targets)
        for name, f in functions.items()
        if name != "torch log_softmax and gather"
    }
    cases["linear_logprobs"] = lambda hidden, weight, targets: linear_logprobs(
        hidden.flatten(0, -2), weight, targets.flatten()
    )
    return cases


def _inputs(vocab: int, dtype: str, from_hidden: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    targets = torch.randint(0, vocab, _SHAPE, generator=generator)
    if not from_hidden:
        return torch.randn(*_SHAPE, vocab, generator=generator).to(dtype), None, targets
    hidden = torch.randn(*_SHAPE, _HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, (torch.randn(vocab, _HIDDEN, generator=generator) / 24).to(dtype).requires_grad_(), targets


def _call(function: Callable, inputs, first: torch.Tensor) -> Callable[[], None]:
    """Forward and backward; ``first``: the logits or hidden states to use, as a leaf."""
    _, weight, targets = inputs

    def call() -> None:
        leaf = first.detach().requires_grad_()
        # Megatron's function works in place, which autograd refuses on a leaf.
        out = function(leaf.view_as(leaf), weight, targets)
        out.sum().backward()
        leaf.grad = None
        if weight is not None:
            weight.grad = None

    return call


def _timed(vocab: int, dtype: str, from_hidden: bool, repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds and peak memory of each function."""
    models.start()
    inputs, small = _inputs(vocab, dtype, from_hidden), _inputs(64, dtype, from_hidden)
    scratch = torch.empty_like(inputs[0]).detach()
    meters = {}
    for name, function in _cases(from_hidden).items():
        _call(function, small, small[0])()  # the first use of a kernel allocates workspaces of its own
        meters[name] = common.Meter(_call(function, inputs, scratch))

    def case(meter: common.Meter) -> float:
        scratch.copy_(inputs[0].detach())
        return meter()

    cases = {name: partial(case, meter) for name, meter in meters.items()}
    times = common.interleaved(cases, repeats, seconds=150 if from_hidden else 40)
    return times, {name: meter.peak for name, meter in meters.items()}


def _operations(name: str, vocab: int, dtype: str, from_hidden: bool) -> list[dict]:
    models.start()
    inputs = _inputs(vocab, dtype, from_hidden)
    call = _call(_cases(from_hidden)[name], inputs, inputs[0])
    call()
    return common.top_operations(call, count=8)
