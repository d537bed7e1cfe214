"""draft"""

from __future__ import annotations

import hashlib
import itertools
import logging

import lightning.pytorch as pl
import torch
from ranks import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_runs import toy_config
from transformers import PreTrainedTokenizerFast

from nemo_brain.groups import Group, Output, Prompt
from nemo_brain.run import run

LETTERS = ("a", "b", "c", "d")
PROMPTS = ("a b", "b c", "d d a", "c a b d")


def reward(prompts, outputs, *, references, metadata):
    digests = (hashlib.sha256(f"{p}>{y}".encode()).digest() for p, y in zip(prompts, outputs, strict=True))
    return [int.from_bytes(digest[:4], "little") / 2**32 for digest in digests]


def everything():
    end = len(LETTERS)
    ids = range(end)
    return [Output([end], "", True), *(Output([i, end], LETTERS[i], True) for i in ids)] + [
        Output([i, j], f"{LETTERS[i]} {LETTERS[j]}", False) for i, j in itertools.product(ids, ids)
    ]


class Laws(pl.Callback):
    def __init__(self):
        self.trace = []

    def on_train_start(self, trainer, module):
        self.groups = [
            Group(Prompt(text, text, [LETTERS.index(c) for c in text.split()]), everything()) for text in PROMPTS
        ]
        self.prior = trainer.strategy.prior_logprobs(self.groups, lambda tokens: None)
        self.on_train_batch_end(trainer, module, None, None, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if len(self.trace) % 10 == 0 or trainer.global_step >= trainer.max_steps:
            self.policy = trainer.strategy.policy_logprobs(self.groups, (1.0,), lambda tokens: None)[0]
        self.trace.append(self.policy)


def laws(directory, *overrides):
    logging.disable(logging.WARNING)
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate((*LETTERS, "<eos>"))}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(directory / "tokenizer")
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in PROMPTS))
    callback = Laws()
    config = toy_config(
        f"run_dir={directory}/run", f"model.tokenizer={directory}/tokenizer", f"data.train={directory}/prompts.jsonl",
        f"reward.function={__file__}:reward", "data.holdout=0", *overrides,
    )
    run(config, callbacks=[callback])
    rewards = torch.tensor([reward([p] * 21, [y.text for y in everything()], references=None, metadata=None) for p in PROMPTS], dtype=torch.float64)
    return callback.prior, torch.stack(callback.trace), rewards


if __name__ == "__main__":
    import sys, tempfile, time
    from pathlib import Path
    gamma, seed, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as d:
        t = time.time()
        [(prior, trace, r)] = run_ranks(laws, 1, Path(d), f"objective.gamma={gamma}", f"seed={seed}", *rest)
        print("seconds", time.time() - t)
    def tv(a, b): return (a - b).abs().sum(-1) / 2
    post = {g: (prior + r / g).softmax(-1) for g in (0.5, 0.15, float(gamma))}
    print("mass", prior.exp().sum(-1), trace[-1].exp().sum(-1), "prior max", prior.exp().amax(-1), "min", prior.exp().amin(-1))
    print("trace", [round(tv(t.exp(), post[float(gamma)]).mean().item(), 4) for t in trace[::20]])
    print("final per prompt", tv(trace[-1].exp(), post[float(gamma)]), "other", {g: tv(trace[-1].exp(), p).mean().item() for g, p in post.items()})
    print("post-post", tv(post[0.5], post[0.15]), "max", post[float(gamma)].amax(-1))
    target = post[float(gamma)][0]; q = trace[-1][0].exp()
    for i in (target - q).abs().argsort(descending=True)[:6].tolist():
        print("worst", everything()[i].text, "prior", prior[0, i].exp().item(), "posterior", target[i].item(), "policy", q[i].item(), "reward", r[0, i].item())
