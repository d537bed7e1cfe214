"""What is measured on a card, part by part, at sizes for a card and at toy sizes for a CPU.

Each part is a generator of rows: what has been measured stays where the next row fails, or where the time ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from nemo.collections.llm.gpt.model.base import GPTConfig
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from benchmarks import common, models, sampling
from nemo_brain.core.packing import Chunk, chunk_tokens, pack, plan
from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE
from nemo_brain.model import attention
from nemo_brain.model.output_layer import linear_logprobs
from nemo_brain.sampling.draws import draw_tokens

Row = dict[str, object]
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Shape:
    """Groups of a step: how many, tokens of the prompt and of each of the n outputs; a micro-batch's positions."""

    groups: int
    prompt: int
    output: int
    n: int
    budget: int

    @property
    def label(self) -> str:
        return f"{self.groups} x ({self.prompt}, {self.output}, {self.n})"

    def drawn(self, vocab: int) -> list:
        return models.groups_of(self.groups, self.prompt, self.output, self.n, vocab)


@dataclass(frozen=True)
class Sizes:
    """``output_layer``: positions, width, vocabulary. ``sampling``: as ``sampling.turns`` takes it."""

    model: str
    steps: tuple[Shape, ...]
    attention: tuple[Shape, ...]
    output_layer: tuple[int, int, int]
    sampling: tuple[tuple[int, ...], ...]
    repeats: int


CARD = Sizes(
    model="1B",
    steps=(
        Shape(8, 400, 50, 8, 8192),
        Shape(8, 512, 512, 8, 16384),
        Shape(16, 128, 128, 8, 16384),
        Shape(64, 400, 50, 8, 16384),
    ),
    attention=(
        Shape(8, 400, 50, 8, 0),
        Shape(16, 128, 128, 8, 0),
        Shape(4, 512, 512, 8, 0),
        Shape(1, 2048, 512, 16, 0),
    ),
    output_layer=(4096, 2048, 128256),
    sampling=((256, 8, 400, 64, 2, 20), (1024, 8, 400, 64, 1, 20), (64, 8, 400, 64, 2, 20)),
    repeats=3,
)
TOY = Sizes(
    model="toy",
    steps=(Shape(2, 9, 4, 2, 64), Shape(4, 9, 4, 2, 64)),
    attention=(Shape(2, 9, 4, 2, 0),),
    output_layer=(16, 64, 512),
    sampling=((4, 2, 12, 5, 1, 10),),
    repeats=1,
)


class Bench:
    """What the parts of one process share. ``seconds``: what the part in hand may take."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.seconds = float("inf")

    @cached_property
    def model(self) -> models.Trainable:
        models.start()
        return models.build(self.sizes.model)

    def step(self, shape: Shape, layout: str) -> Callable[[], None]:
        return models.brain_step(self.model, shape.drawn(self.model.weights.vocab_size), layout, shape.budget)

    def timed(self, cases: dict[str, Callable[[], object]], among: int = 1) -> tuple[dict[str, list[float]], dict]:
        """Seconds of the cases in turns, and their peaks of extra memory; ``among``: how many such calls share the
        part's time."""
        meters = {name: common.Meter(case) for name, case in cases.items()}
        times = common.interleaved(meters, self.sizes.repeats, self.seconds / among)
        return times, {name: meter.peak for name, meter in meters.items()}


def output_layer(bench: Bench) -> Iterator[Row]:
    """Forward and backward from hidden states to log-probs; memory includes the weight's gradient."""
    positions, width, vocab = bench.sizes.output_layer
    make = partial(torch.randn, device=models.DEVICE)
    hidden = make(positions, width).to(models.DTYPE).requires_grad_()
    weight = (0.02 * make(vocab, width)).to(models.DTYPE).requires_grad_()
    targets = torch.randint(0, vocab, (positions,), device=models.DEVICE)
    cases: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: linear_logprobs(hidden, weight, targets)[0].sum(),
        "torch, bf16 logits": lambda: cross_entropy(hidden @ weight.T, targets, reduction="sum"),
        "torch, fp32 logits": lambda: cross_entropy((hidden @ weight.T).float(), targets, reduction="sum"),
    }
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        pass
    else:
        fused = LigerFusedLinearCrossEntropyFunction.apply
        cases["Liger"] = lambda: fused(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    def both(forward: Callable[[], torch.Tensor]) -> None:
        forward().backward()
        hidden.grad = weight.grad = None

    times, peaks = bench.timed({name: partial(both, case) for name, case in cases.items()})
    for name, seconds in times.items():
        spread = common.spread(seconds)
        flops = 6 * positions * width * vocab / spread["median"]
        yield {"case": name, "seconds": spread, "tflops": flops / 1e12, "memory": peaks[name]}


def attention_of_a_layer(bench: Bench) -> Iterator[Row]:
    """Forward and backward by each way that is there; training takes the first."""
    found = {name: getattr(attention, name) for name in ("find_merging", "find_kernel")}
    for shape in bench.sizes.attention:
        layout, (q, k, v) = _packed(shape)

        def both(kept: tuple[str, ...], q=q, k=k, v=v, layout=layout) -> None:
            for name, find in found.items():
                setattr(attention, name, find if name in kept else lambda *_: None)
            attention.packed_attention(q, k, v, layout).sum().backward()
            q.grad = k.grad = v.grad = None

        cases = {"block by block": partial(both, ())}
        if found["find_kernel"](q) is not None:
            cases = {"one variable-length call": partial(both, ("find_kernel",)), **cases}
        if found["find_merging"](q, k) is not None:
            cases = {"merged by log-sums": partial(both, ("find_merging",)), **cases}
        try:
            yield from _layer_rows(bench, shape, layout, cases)
        finally:
            for name, find in found.items():
                setattr(attention, name, find)


def flex_attention_of_a_layer(bench: Bench) -> Iterator[Row]:
    """The same by FlexAttention, compiled once for all lengths; on a CPU, where it has no backward, forward alone.

    The mask is made before: a micro-batch's layers share it. No training takes this way.
    """
    attend = torch.compile(flex_attention, dynamic=True) if models.ON_CARD else flex_attention
    for shape in bench.sizes.attention:
        layout, tensors = _packed(shape)
        q, k, v = tensors if models.ON_CARD else (tensor.detach() for tensor in tensors)
        mask = block_mask(layout, models.DEVICE)

        def both(q=q, k=k, v=v, mask=mask) -> None:
            out = attend(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)
            if models.ON_CARD:
                out.sum().backward()
            q.grad = k.grad = v.grad = None

        yield from _layer_rows(bench, shape, layout, {"FlexAttention": both})


def block_mask(layout: torch.Tensor, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a packed row: a position sees its own segment and its block's prefix, up to itself."""
    bounds = []  # of every position: its block's start, its prefix's end, its segment's start
    for prefix, *segments in layout.tolist():
        start = len(bounds)
        bounds += [(start, start + prefix, start)] * prefix
        for length in segments:
            bounds += [(start, start + prefix, len(bounds))] * length
    start_S, end_S, own_S = torch.tensor(bounds, device=device).T.contiguous()

    def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & ((k >= own_S[q]) | ((k >= start_S[q]) & (k < end_S[q])))

    make = torch.compile(create_block_mask, dynamic=True) if models.ON_CARD else create_block_mask
    return make(sees, None, None, len(bounds), len(bounds), device=str(device))


def _packed(shape: Shape) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layout of the shape's groups in one row, and queries, keys and values [heads, positions, width]."""
    heads, shared, width = (32, 8, 64) if models.ON_CARD else (4, 2, 16)
    layout = torch.tensor([[shape.prompt - 1] + [shape.output] * shape.n] * shape.groups, dtype=torch.int32)
    make = partial(torch.randn, device=models.DEVICE, dtype=models.DTYPE)
    return layout, [make(h, int(layout.sum()), width).requires_grad_() for h in (heads, shared, shared)]


def _layer_rows(
    bench: Bench, shape: Shape, layout: torch.Tensor, cases: dict[str, Callable[[], object]]
) -> Iterator[Row]:
    times, peaks = bench.timed(cases, len(bench.sizes.attention))
    for name, seconds in times.items():
        yield {
            "shape": shape.label,
            "kernel": name,
            "seconds": common.spread(seconds),
            "memory": peaks[name],
            "bytes_per_position": peaks[name] / int(layout.sum()),
        }


def drawing(bench: Bench) -> Iterator[Row]:
    """A token for each of 256 rows from their logits, with its log-prob; beside torch's softmax and multinomial."""
    rows, vocab = 256, bench.sizes.output_layer[2]
    logits = torch.randn(rows, vocab, device=models.DEVICE).to(models.DTYPE)
    uniforms = torch.rand(rows, dtype=torch.float64).to(models.DEVICE)
    cases = {
        "ours": lambda: draw_tokens(logits, uniforms, vocab),
        "torch": lambda: logits.float().softmax(-1).multinomial(1),
    }
    times, peaks = bench.timed(cases)
    for name, seconds in times.items():
        yield {"rows": rows, "case": name, "seconds": common.spread(seconds), "memory": peaks[name]}


def step(bench: Bench) -> Iterator[Row]:
    """An optimizer step in both layouts."""
    parameters = models.parameters_of(bench.model)
    output_weight = bench.model.weights.vocab_size * bench.model.config.hidden_size
    for shape in bench.sizes.steps:
        groups = shape.drawn(bench.model.weights.vocab_size)
        layouts = ("shared_prefix", "separate_rows")
        cases = {layout: bench.step(shape, layout) for layout in layouts}
        times, peaks = bench.timed(cases, len(bench.sizes.steps))
        for layout in layouts:
            positions = sum(chunk_tokens(group, range(shape.n), layout) for group in groups)
            flops = 6 * (
                (parameters - output_weight) * positions + output_weight * shape.groups * shape.n * shape.output
            )
            spread = common.spread(times[layout])
            yield {
                "engine": _engine(),
                "shape": shape.label,
                "layout": layout,
                "positions": positions,
                "seconds": spread,
                "positions_per_second": positions / spread["median"],
                "flops": flops / spread["median"],
                "ratio": common.ratio(times["shared_prefix"], times["separate_rows"]),
                "memory": peaks[layout],
                "bytes_per_position": peaks[layout] / min(positions, shape.budget),
            }


def nemo(bench: Bench) -> Iterator[Row]:
    """NeMo's language-model step over a row of as many positions, its layers and fused attention, our optimizer."""
    shape = bench.sizes.steps[0]
    groups = shape.drawn(bench.model.weights.vocab_size)
    kind = GPTConfig if HAVE_TRANSFORMER_ENGINE else models.nemo_config(causal_kernel=True)
    theirs = models.build(bench.sizes.model, kind)
    chunks = [Chunk(g, tuple(range(shape.n))) for g in range(shape.groups)]
    row = pack(groups, chunks, "shared_prefix").tokens_1S.to(models.DEVICE)
    cases = {"BRAIn": bench.step(shape, "shared_prefix"), "NeMo": models.nemo_step(theirs, [row])}
    times, peaks = bench.timed(cases)
    for name, seconds in times.items():
        yield {
            "engine": _engine(),
            "step": name,
            "shape": shape.label,
            "positions": row.numel(),
            "seconds": common.spread(seconds),
            "ratio": common.ratio(times["BRAIn"], seconds),
            "memory": peaks[name],
        }


def launches(bench: Bench) -> Iterator[Row]:
    """What a step launches and waits for, in all and for each further micro-batch; and sampling."""
    shape = bench.sizes.steps[0]
    groups = shape.drawn(bench.model.weights.vocab_size)
    counted = []
    for budget in (shape.budget, shape.budget // 4):
        call = bench.step(replace(shape, budget=budget), "shared_prefix")
        call()
        counts = _profiled(call)
        counted.append((len(plan(groups, budget, "shared_prefix").ranks[0]), counts))
        yield {"of": "a step", "engine": _engine(), "micro_batches": counted[-1][0], **counts}
    (few, first), (many, second) = counted
    numbers = ("launches", "waits", "device_seconds")
    yield {
        "of": "each further micro-batch",
        "engine": _engine(),
        "micro_batches": 1,
        **{name: (second[name] - first[name]) / (many - few) for name in numbers},
    }
    rows, n, prompt, new, *_ = bench.sizes.sampling[0]
    prompts = sampling.text_prompts(bench.sizes.model, rows // n, prompt)
    call = sampling.ours_on(bench.model, prompts, n, new, rows, None, [])
    call()
    of = f"{new} tokens of {rows} rows in sampling, and {rows // n} prompts of {prompt}"
    yield {"of": of, "engine": _engine(), "micro_batches": None, **_profiled(call)}


def _profiled(call: Callable[[], object]) -> dict[str, object]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * models.ON_CARD
    with profile(activities=activities) as profiler:
        call()
        common.synchronize()
    events = profiler.key_averages()
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)
    return {
        "launches": sum(event.count for event in events if event.key in _LAUNCHES),
        "waits": sum(event.count for event in events if event.key in _WAITS),
        "device_seconds": sum(event.self_device_time_total for event in events) / 1e6,
        "longest": ", ".join(
            f"{event.key[:40]} {event.self_device_time_total / 1e3:.1f} ms" for event in kernels[:4] if models.ON_CARD
        ),
    }


def sampled(bench: Bench) -> Iterator[Row]:
    """Tokens per second of ours and of transformers' ``generate``, in turns."""
    theirs = sampling.transformers_model(bench.sizes.model)
    for case in bench.sizes.sampling:
        rows, n, prompt, new, *_ = case
        found = sampling.turns(bench.model, theirs, bench.sizes.model, case)
        for name, result in found.items():
            seconds = common.spread(result["seconds"])
            yield {
                "by": name,
                "rows": rows,
                "n": n,
                "prompt": prompt,
                "new": new,
                "rate": common.spread(result["rates"]),
                "seconds_per_token": seconds["median"] / new,
                "memory": result["peak"],
                "ratio": common.ratio(found["ours"]["rates"], result["rates"]),
            }


def vllm(bench: Bench) -> Iterator[Row]:
    """Tokens per second of vLLM, its own random weights of the same shape; where it is not installed, ImportError."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        sampling.llama_config(models.weights_of(bench.sizes.model)).save_pretrained(folder)
        engine = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512)
        for rows, n, prompt, new, *_ in bench.sizes.sampling:
            prompts = [
                {"prompt_token_ids": found.token_ids}
                for found in sampling.text_prompts(bench.sizes.model, rows // n, prompt)
            ]
            options = SamplingParams(n=n, temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
            call = partial(engine.generate, prompts, options, use_tqdm=False)
            times = common.interleaved({"vllm": call}, bench.sizes.repeats, bench.seconds / 3)["vllm"]
            yield {
                "by": "vLLM",
                "rows": rows,
                "n": n,
                "prompt": prompt,
                "new": new,
                "rate": common.spread([rows * new / seconds for seconds in times]),
                "seconds_per_token": common.spread(times)["median"] / new,
            }


def _engine() -> str:
    return "Transformer Engine" if HAVE_TRANSFORMER_ENGINE else "none"
