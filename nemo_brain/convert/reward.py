"""Reward models as Hugging Face directories: a trunk and ``score.weight``, for AutoModelForSequenceClassification.

config.json also holds ``reward_mean``, which is subtracted from the score, and ``reward_template``, how prompts were
rendered (``data.template``); transformers ignores both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from nemo_brain.convert.export import Export
from nemo_brain.convert.huggingface import HuggingFaceDirectory
from nemo_brain.convert.open import ARCHITECTURES, open_weights, resolve
from nemo_brain.convert.weight_files import weight_files
from nemo_brain.model.parameters import VOCABULARY_TENSORS
from nemo_brain.model.random_weights import normal
from nemo_brain.model.reward_head import HEAD
from nemo_brain.model.weights import Weights

SCORE = "score.weight"
PADDING = "<|reward_padding|>"  # of an exported reward model whose tokenizer has no padding token of its own


class RewardWeights:
    """``Weights`` of a reward model.

    Args:
        trunk: all but the head. Its output layer is left where it is.
        head: [1, H].
        mean: subtracted from every reward.
        template: how prompts are rendered, as ``data.template``.
    """

    def __init__(self, trunk: Weights, head: torch.Tensor, mean: float = 0.0, template: str | None = None):
        self.trunk, self.head, self.mean, self.template = trunk, head, mean, template
        self.gpt_config = trunk.gpt_config
        self.vocab_size = trunk.vocab_size
        self.generation_config = trunk.generation_config

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.trunk.tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.trunk.stop_token_ids

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.head if name == HEAD else self.trunk.tensor(name, shape)


def new_head(trunk: Weights, std: float, seed: int) -> RewardWeights:
    """A reward model of a language model's trunk; its head is normal with ``std`` (0: zero), drawn from ``seed``."""
    return RewardWeights(trunk, std * normal(seed, HEAD, (1, trunk.gpt_config["hidden_size"])))


def is_reward_model(path: str | Path) -> bool:
    """Whether the path is a Hugging Face directory with a ``score.weight``."""
    path = resolve(path)
    return (path / "config.json").is_file() and SCORE in weight_files(path)


def open_reward_model(path: str | Path, key: str, allow_nonfinite: bool = False) -> RewardWeights:
    """Opens a reward model without reading its trunk's tensors.

    Args:
        path: a directory that a reward model was exported to, or another one of a supported architecture's
            ForSequenceClassification with one label.
        key: the configuration key that errors name.
        allow_nonfinite: a tensor that is not finite is taken, rather than refused when it is read.

    Raises:
        ValueError: there is none, or it has not one score.
    """
    if not resolve(path).is_dir() or not is_reward_model(path):
        raise ValueError(
            f"{key}: {path} is not the directory of a reward model (config.json, and safetensors with {SCORE}); train "
            "one with examples/megatron_reward_model.py"
        )
    unless = None if allow_nonfinite else f"{key.partition('.')[0]}.allow_nonfinite"
    source = HuggingFaceDirectory(resolve(path), unless)
    head = source.tensor(SCORE)
    if head.ndim != 2 or len(head) != 1:
        raise ValueError(f"{key}: {path} has a {SCORE} of shape {list(head.shape)}; a reward model has one label")
    config = source.config
    if config.get("model_type") not in ARCHITECTURES:
        open_weights(path)  # says which are supported
    trunk = ARCHITECTURES[config["model_type"]](_Trunk(source))
    return RewardWeights(trunk, head, config.get("reward_mean", 0.0), config.get("reward_template"))


class _Trunk:
    """A reward model's directory as a language model's, for the architecture's reader: without the score; tied, so that
    no output layer is missed."""

    def __init__(self, source: HuggingFaceDirectory):
        self._source = source
        self.config = {**source.config, "tie_word_embeddings": True}
        self.generation_config = source.generation_config
        self.names = source.names - {SCORE}
        self.tensor = source.tensor

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._source.tokenizer


class RewardExport:
    """``Export`` of a reward model whose trunk ``export`` can express.

    transformers reads the score at the last token that is no padding, so padding must be no token that ends a row: one
    that ends outputs, or stands for unknown text. The tokenizer keeps its padding token if it is none of these;
    otherwise it gets ``PADDING``, whose row in the embedding is one that no token had, or a further one of zeros.
    """

    def __init__(self, export: Export, mean: float, template: str | None):
        (causal,) = export.config.architectures
        classifier = re.sub(r"(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", causal)
        assert classifier != causal, causal
        self._trunk = export
        self.vocab_size = export.vocab_size
        self.tokenizer = copy.deepcopy(export.tokenizer)
        self.tokenizer.padding_side = "right"  # as in training, where absolute positions count from a row's first token
        ends = export.generation_config.get("eos_token_id")
        used = {*(ends if isinstance(ends, list) else [ends])}
        used |= {getattr(self.tokenizer, f"{name}_token_id") for name in ("eos", "unk", "bos", "sep", "cls")}
        if self.tokenizer.pad_token_id in {None, *used}:
            self.tokenizer.add_special_tokens({"pad_token": PADDING})
        padding = self.tokenizer.pad_token_id
        self._added_rows = max(0, padding + 1 - self.vocab_size)
        self.generation_config = {**export.generation_config, "pad_token_id": padding}
        self.config = export.config
        self.config.update(
            {
                "architectures": [classifier],
                "num_labels": 1,
                "pad_token_id": padding,
                "vocab_size": self.vocab_size + self._added_rows,
                "tie_word_embeddings": True,
                "reward_mean": mean,
                "reward_template": template,
            }
        )

    def tensors(self, name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name == HEAD:
            yield SCORE, full
            return
        if name in VOCABULARY_TENSORS:
            full = torch.cat([full, full.new_zeros(self._added_rows, full.shape[1])])
        yield from self._trunk.tensors(name, full)
