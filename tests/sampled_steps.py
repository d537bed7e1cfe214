"""What a sampler draws by looks of several tokens, on whatever device there is."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from benchmarks import models
from nemo_brain.core.groups import Prompt
from nemo_brain.data.stop import Stop
from nemo_brain.sampling import draws
from nemo_brain.sampling.sampler import Sampler, SamplingOptions

_PROMPTS = [Prompt(f"p{n}", "", [(7 * n + 3 * i) % 500 for i in range(n)]) for n in (4, 1, 9, 30, 6, 17)]
_TOKENIZER = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))


def sampled_by_steps(steps: Sequence[int | None], **changes) -> tuple[list[list], list[str]]:
    """For each number of tokens between two looks (None: the device's own): every output's tokens and log q', of 6
    groups of 4 outputs, 8 in flight. fp32: in bf16 the order of a sum moves draws to the next token. And what of a
    card's was used: kernels of attention and of draws, recorded graphs."""
    models.start()
    fp32 = dict(params_dtype=torch.float32, pipeline_dtype=torch.float32, bf16=False)
    chunk, config, _ = models.bare("toy", **fp32)
    results: list[list] = []
    used: set[str] = set()
    for count in steps:
        # A dozen tokens of 512 end an output: rows end at any time, and prompts join.
        options = SamplingOptions(4, 60, Stop(tuple(range(12))), rows_in_flight=8, steps=count, **changes)
        sampler = Sampler([chunk], config, _TOKENIZER, options)
        record = sampler._recorded
        sampler._recorded = lambda step, record=record: used.add("graphs") or record(step)
        if sampler._kernel:
            used.add("attention")
        groups = sorted(sampler.sample(_PROMPTS, seed=1, iteration=2), key=lambda found: found[0])
        results.append(
            [
                (output.token_ids, logprob)
                for _, group in groups
                for output, logprob in zip(group.outputs, group.proposal_logprobs, strict=True)
            ]
        )
    if draws._kernels(torch.device(sampler.device)) is not None:
        used.add("draws")
    return results, sorted(used)
