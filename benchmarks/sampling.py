"""Our sampler against transformers' generate, from the same weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common, models
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.sampler import Sampler, SamplingOptions

TITLE = "Sampling, against transformers"
METHOD = """
SmolLM2-135M-Instruct, fp32, temperature 1, no truncation. transformers: `generate(do_sample=True,
num_return_sequences=n)` with its default dynamic cache and attention by torch's fused kernel; prompts are padded on
the left. Ours: `Sampler` with as many rows in flight as transformers has in a batch; it also computes the log-probs
of what it draws, and the texts. Prompts are pieces of this repository's documents. Tokens per second count sampled
tokens over the whole call, prompts' forward passes included.

Fixed lengths: no token ends an output. Drawn lengths: a frequent token (the comma) ends an output on both sides, so
that lengths vary as the model's own law has it, to at most the stated number; prompts of 64 to 192 tokens, and twice
as many outputs as rows, which transformers takes in two batches, each until its longest output ends. Tokens after an
output's end do not count.
"""
TARGET = 2.0
# (rows at a time, n, prompt tokens, new tokens, repeats, seconds)
FIXED = [
    (16, 1, 128, 64, 1, 0),
    (16, 8, 128, 64, 2, 40),
    (64, 1, 128, 64, 1, 0),
    (64, 8, 128, 64, 3, 240),
    (64, 8, 400, 64, 1, 0),
]
DRAWN = (64, 8, None, 96, 2, 100)


def measure(smoke: bool) -> dict:
    size = "toy" if smoke else models.SMOLLM2
    fixed = [(4, 2, 12, 5, 1, 10)] if smoke else FIXED
    drawn = (4, 2, None, 6, 1, 10) if smoke else DRAWN
    measured = common.fresh(_all, size, fixed, drawn)
    rows, targets = [], []
    for (count, n, prompt, new, *_), case in zip([*fixed, drawn], measured, strict=True):
        row = {
            "rows": count,
            "n": n,
            "prompt": prompt or "64 to 192",
            "new": new if prompt else f"drawn, at most {new}",
        }
        for name, result in case.items():
            row[name] = common.spread(result["rates"])
            row[f"{name}_seconds"] = common.spread(result["seconds"])
            row[f"{name}_tokens"] = result["tokens"] // len(result["seconds"])
            row[f"{name}_memory"] = result["peak"]
        row["ratio"] = common.ratio(case["ours"]["rates"], case["transformers"]["rates"])
        rows.append(row)
        if smoke or (n == 8 and count == 64):
            what = f"our tokens/s / transformers', {count} rows, n = {n}, prompt {row['prompt']}, length {row['new']}"
            targets.append({"what": what, "value": row["ratio"], "at_least": TARGET})
    columns = [
        ("rows", "rows", "count"),
        ("n", "n", "count"),
        ("prompt", "prompt tokens", "text"),
        ("new", "new tokens", "text"),
        ("ours", "ours, tokens/s", "rate"),
        ("transformers", "transformers, tokens/s", "rate"),
        ("ratio", "ours / transformers", "ratio"),
        ("ours_seconds", "ours, s", "seconds"),
        ("transformers_seconds", "transformers, s", "seconds"),
        ("ours_memory", "ours, extra memory", "bytes"),
        ("transformers_memory", "transformers, extra memory", "bytes"),
    ]
    return {"parts": [{"columns": columns, "rows": rows}], "targets": targets}


def profile(smoke: bool) -> list[dict]:
    """torch.profiler on our sampler."""
    size, case = ("toy", (4, 2, 12, 5, 1, 10)) if smoke else (models.SMOLLM2, (64, 8, 128, 64, 1, 60))
    return [{"title": f"ours, {case[0]} rows, n = {case[1]}", "operations": common.fresh(_operations, size, case)}]


def sampled_groups(sampler: Sampler, prompts: list[Prompt], iteration: int) -> list[SampledGroup]:
    """All groups, in the order in which they were finished."""
    return [group for _, group in sampler.sample(prompts, seed=0, iteration=iteration)]


def transformers_model(size: str) -> LlamaForCausalLM:
    """The model in transformers: the same weights for SmolLM2, random ones of the same shape otherwise."""
    weights = models.weights_of(size)
    if size == models.SMOLLM2:
        source = weights.source
        model = LlamaForCausalLM(LlamaConfig(**{**source.config, "attn_implementation": "sdpa"}))
        model.load_state_dict({name: source.tensor(name) for name in source.names}, strict=False)
        model.tie_weights()
        return model.eval()
    with torch.device(models.DEVICE):
        return LlamaForCausalLM(llama_config(weights)).to(models.DTYPE).eval()


def llama_config(weights: Weights) -> LlamaConfig:
    """transformers' name for the shape of random weights."""
    gpt = weights.gpt_config
    return LlamaConfig(
        vocab_size=weights.vocab_size,
        hidden_size=gpt["hidden_size"],
        intermediate_size=gpt["ffn_hidden_size"],
        num_hidden_layers=gpt["num_layers"],
        num_attention_heads=gpt["num_attention_heads"],
        num_key_value_heads=gpt["num_query_groups"],
        tie_word_embeddings=True,
    )


def text_prompts(size: str, count: int, length: int | None) -> list[Prompt]:
    """Prompts of ``length`` tokens, or of 64 to 192, from this repository's documents."""
    weights = models.weights_of(size)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(common.ROOT.glob("*.md")))
    tokens = list(text.encode())[:4000] if weights.tokenizer is None else weights.tokenizer(text)["input_ids"]
    draw = random.Random(0)
    prompts = []
    for i in range(count):
        size_i = length or draw.randint(64, 192)
        start = draw.randrange(len(tokens) - size_i)
        prompts.append(Prompt(str(i), "", tokens[start : start + size_i]))
    return prompts


def _all(size: str, fixed, drawn) -> list[dict]:
    models.start()
    model, theirs = models.build(size), transformers_model(size)
    turns(model, theirs, size, (8, 8, 16, 4, 1, 30))  # warms both up
    return [turns(model, theirs, size, case) for case in [*fixed, drawn]]


def turns(model, theirs, size, case) -> dict:
    """Ours and transformers in turns: each one's seconds, tokens per second, tokens and peak of memory."""
    rows, n, length, new, repeats, seconds = case
    outputs = rows if length else 2 * rows
    prompts = text_prompts(size, outputs // n, length)
    end = None if length else _end_token(model)
    counts: dict[str, list[int]] = {"ours": [], "transformers": []}
    ours = ours_on(model, prompts, n, new, rows, end, counts["ours"])
    generate = _transformers(theirs, prompts, n, new, rows, end, counts["transformers"])
    meters = {"ours": common.Meter(ours), "transformers": common.Meter(generate)}
    # On a card the first call of a shape makes what later ones have.
    times = common.interleaved(meters, repeats, seconds, warm_up=models.ON_CARD)
    print(f"  {rows} rows, n = {n}, prompt {length}, {new} new: {sum(map(sum, times.values())):.0f} s", flush=True)
    if length:
        assert all(count == outputs * new for found in counts.values() for count in found), counts
    return {
        name: {
            "seconds": times[name],
            "rates": [count / s for count, s in zip(counts[name][-len(times[name]) :], times[name], strict=True)],
            "tokens": sum(counts[name][-len(times[name]) :]),
            "peak": meters[name].peak,
        }
        for name in times
    }


def _end_token(model) -> int:
    tokenizer = model.weights.tokenizer
    return 44 if tokenizer is None else tokenizer(",")["input_ids"][-1]


def ours_on(model, prompts, n, new, rows, end, counts) -> Callable[[], None]:
    decode = getattr(model.weights.tokenizer, "decode", lambda ids, **_: str(ids))
    tokenizer = SimpleNamespace(decode=decode)
    stop = Stop(() if end is None else (end,))
    options = SamplingOptions(outputs=n, max_new_tokens=new, stop=stop, rows_in_flight=rows)
    sampler = Sampler(model.chunks, model.config, tokenizer, options)

    def call() -> None:
        groups = sampled_groups(sampler, prompts, iteration=len(counts))
        counts.append(sum(len(output.token_ids) for group in groups for output in group.outputs))

    return call


def _transformers(theirs, prompts, n, new, rows, end, counts) -> Callable[[], None]:
    pad = 0
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, num_return_sequences=n)
    theirs.generation_config.eos_token_id = end

    @torch.no_grad()
    def call() -> None:
        torch.manual_seed(len(counts))
        count = 0
        for start in range(0, len(prompts), rows // n):
            batch = [prompt.token_ids for prompt in prompts[start : start + rows // n]]
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in batch], device=models.DEVICE)
            mask = torch.tensor(
                [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in batch], device=models.DEVICE
            )
            out = theirs.generate(ids, attention_mask=mask, eos_token_id=end, pad_token_id=pad, **options)[:, width:]
            lengths = torch.full((len(out),), out.shape[1], device=models.DEVICE)
            if end is not None:
                ended = out == end
                lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, lengths)
            count += int(lengths.sum())
        counts.append(count)

    return call


def _operations(size: str, case) -> list[dict]:
    models.start()
    rows, n, length, new, *_ = case
    counts: list[int] = []
    call = ours_on(models.build(size), text_prompts(size, rows // n, length), n, new, rows, None, counts)
    return common.top_operations(call)
