"""Samplers of tests/completion_server.py, and how to look at what they have sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from completion_server import END, TOKENIZER, VOCAB, CompletionServer

from nemo_brain.config.remote import RemoteConfig
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.data.stop import Stop
from nemo_brain.sampling.pool import ServedWeights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions

PROMPTS = [Prompt(f"p{i}", text, list(text.encode())) for i, text in enumerate(["a", "Straße", "<eos>", "xyz" * 5])]
STOP = Stop((END,))
OPTIONS = SamplingOptions(outputs=4, max_new_tokens=6, stop=STOP)


def sampler(where: CompletionServer | str | list[str], options: SamplingOptions = OPTIONS, **config) -> RemoteSampler:
    url = where.url if isinstance(where, CompletionServer) else where
    directory, version = config.pop("directory", None), config.pop("version", None)
    limits = {"timeout_seconds": 20.0, "request_timeout_seconds": 10.0, "concurrency": 8}
    remote = RemoteConfig(url=url, model="policy", **{**limits, **config})
    return RemoteSampler(remote, options, TOKENIZER, VOCAB, weights=ServedWeights(directory, version))


def finished(sampler: RemoteSampler, prompts=PROMPTS, seed=1, iteration=2, **options) -> Iterator:
    """What ``sample`` yields, without the signs that nothing came for a while."""
    with contextlib.closing(sampler.sample(prompts, seed, iteration, **options)) as answers:
        yield from (answer for answer in answers if answer is not None)


def sampled(sampler: RemoteSampler, prompts=PROMPTS, seed=1, iteration=2) -> list[SampledGroup]:
    """The groups in the order of their prompts."""
    pairs = list(finished(sampler, prompts, seed, iteration))
    assert sorted(index for index, _ in pairs) == list(range(len(prompts)))
    assert all(group.prompt is prompts[index] for index, group in pairs)
    return [group for _, group in sorted(pairs, key=lambda pair: pair[0])]


def tokens_of(groups: list[SampledGroup]) -> list:
    return [[output.token_ids for output in group.outputs] for group in groups]


def teacher_forced(model, prompt: Prompt, tokens: list[int], temperature: float = 1.0) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt.token_ids + tokens])).logits[0, len(prompt.token_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()


RELOAD = [
    {"path": "/collective_rpc", "json": {"method": "reload_weights", "kwargs": {"weights_path": "{path}"}}},
    {"path": "/reset_prefix_cache", "json": {}},
]
