"""What a BRAIn run is made on: prompts to sample for, or groups sampled elsewhere, and held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemo_brain.config.brain import DataConfig
from nemo_brain.config.evaluate import EvaluationDataConfig
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.data.prompts import Prompts, load_prompts
from nemo_brain.data.records import made_source
from nemo_brain.data.rollouts import read_rollouts
from nemo_brain.data.stop import Stop


@dataclass(frozen=True)
class BRAInData:
    """``prompts`` or ``offline`` groups to train on; ``held_out`` prompts, none of them: no validation."""

    prompts: Sequence[Prompt]
    offline: Sequence[SampledGroup]
    held_out: Sequence[Prompt]

    @property
    def sizes(self) -> dict[str, int]:
        return {"prompts": len(self.prompts), "groups": len(self.offline), "held-out prompts": len(self.held_out)}


def read_data(
    data: DataConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    stop: Stop,
    vocab_size: int,
    max_new_tokens: int,
    max_held_out: int | None,
) -> BRAInData:
    """Reads and checks all of it.

    Args:
        seed: of the choice of held-out prompts.
        stop: what ends an output.
        vocab_size: rows of the embedding.
        max_new_tokens: the longest output of an offline group.
        max_held_out: at most so many prompts are held out; None: all that there are.

    Raises:
        ValueError: naming the key or the file's line, what is wrong and the remedy.
    """
    held_out: Sequence[Prompt] = []
    if data.validation is not None:
        held_out = read_prompts(data.validation, "data.validation", data, tokenizer)
    if data.rollouts is not None:
        offline = read_rollouts(
            data.rollouts,
            tokenizer=tokenizer,
            stop=stop,
            template=data.template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            vocab_size=vocab_size,
            key="data.rollouts",
        )
        return BRAInData([], offline, held_out[:max_held_out])
    prompts = read_prompts(data.train, "data.train", data, tokenizer)
    if data.validation is None and data.holdout:
        prompts, held_out = prompts.split(int(data.holdout) if data.holdout >= 1 else data.holdout, seed)
    return BRAInData(prompts, [], held_out[:max_held_out])


def read_prompts(
    source: Any, key: str, data: DataConfig | EvaluationDataConfig, tokenizer: PreTrainedTokenizerFast
) -> Prompts:
    """The prompts of a file, of several, or of a target that Hydra makes. ValueError: as ``read_data``."""
    loaded = load_prompts(
        made_source(source, key),
        key=key,
        tokenizer=tokenizer,
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    if loaded.truncated:
        some = "the first " if loaded.tokenised < len(loaded.prompts) else ""
        cut = f"{loaded.truncated} of {some}{loaded.tokenised} prompts were cut"
        print(f"{key}: {cut} to {data.max_prompt_tokens} tokens")
    return loaded.prompts
