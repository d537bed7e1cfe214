"""A Hugging Face reward model with one label as the reward, with its own tokenizer and its own template.

Shapes: B rows of a batch, S positions.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from nemo_brain.convert.source import check_finite
from nemo_brain.convert.weight_files import weight_files
from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.data.templates import FormatString, lacks_chat_template, render_chat
from nemo_brain.data.tokenizers import load_tokenizer, protect, start_tokens
from nemo_brain.rewards.protocol import messages_of

_UNLIMITED = 10**9  # tokenizers without a limit name a far larger one
# The argument's name; later versions warn about the earlier one.
_DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
_SAVE = "AutoModelForSequenceClassification.from_pretrained(OLD, num_labels=1).save_pretrained(NEW)"


class HuggingFaceReward:
    """The logit of an ``AutoModelForSequenceClassification`` with one label.

    Special tokens come from the reward model's template and tokenizer only, never from a prompt's or an output's text.

    Args:
        model: a Hugging Face directory: config.json, safetensors and a fast tokenizer. Nothing is downloaded, and no
            code in it is run.
        template: ``"chat"`` (the tokenizer's chat template over the prompt's messages and the output as the
            assistant's), ``"pair"`` (prompt and output as the tokenizer's pair of texts, as BERT-like models take
            them) or a format string with ``{prompt}`` and ``{output}``, to which the tokenizer adds its special tokens.
            The last two take prompts of one message.
        append_end_token: put the tokenizer's end token behind the row, unless it ends so.
        max_tokens: the longest row; None: what the model and its tokenizer were made for.
        too_long: ``"refuse"`` a longer row, or ``"truncate"`` it on the left, behind the tokenizer's start token; of a
            pair, the prompt.
        batch_tokens: positions of a batch, padding included. Rows of similar length share one.
        device: None: this process's CUDA device, or the CPU where there is none.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        allow_nonfinite: weights that are not finite are taken rather than refused.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    rescorable = True

    def __init__(
        self,
        model: str,
        template: str = "chat",
        append_end_token: bool = False,
        max_tokens: int | None = None,
        too_long: str = "refuse",
        batch_tokens: int = 16384,
        device: str | None = None,
        dtype: str = "float32",
        allow_nonfinite: bool = False,
    ):
        if too_long not in ("refuse", "truncate"):
            raise ValueError(f"reward.too_long must be refuse or truncate, not {too_long!r}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"reward.dtype must be float32, bfloat16 or float16, not {dtype!r}")
        for name, value in {"batch_tokens": batch_tokens, "max_tokens": max_tokens}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"reward.{name} must be an integer of at least 1, not {value!r}")
        self.name = f"HuggingFaceReward of {model}"
        self._path = Path(model)
        self._dtype = getattr(torch, dtype)
        self._device = _device(device)
        self._batch_tokens = batch_tokens
        self._finite_unless = None if allow_nonfinite else "reward.allow_nonfinite"
        self._truncate = too_long == "truncate"
        self._config = _checked_config(self._path)
        rows = getattr(self._config, "vocab_size", None)
        self._tokenizer = load_tokenizer(model, key="reward.model", end_token=append_end_token, vocab_size=rows)
        # Saved tokenizers may bring truncation and padding of their own, which post_process would apply.
        self._tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer.backend_tokenizer.no_padding()
        self._protected = protect(self._tokenizer)
        self._start = start_tokens(self._tokenizer)
        self._end = self._tokenizer.eos_token_id if append_end_token else None
        self._template = template if template in ("chat", "pair") else None
        if template == "chat" and (lack := lacks_chat_template(self._tokenizer)):
            raise ValueError(
                f"reward.template=chat: the reward model's tokenizer {lack} (set reward.template to pair, "
                "or to a format string with {prompt} and {output})"
            )
        if self._template is None:
            self._format = FormatString(template, ("prompt", "output"), "reward.template", "chat, pair")
        self._pad = self._config.get_text_config().pad_token_id
        self._types = template == "pair" and "token_type_ids" in self._tokenizer.model_input_names
        positions = getattr(self._config, "max_position_embeddings", None)
        known = [limit for limit in (positions, self._tokenizer.model_max_length) if limit and limit < _UNLIMITED]
        if max_tokens is None and not known:
            raise ValueError("reward.max_tokens: neither the model nor its tokenizer names its longest row: set it")
        if positions and max_tokens and max_tokens > positions:
            raise ValueError(
                f"reward.max_tokens={max_tokens} is more than the model's {positions} positions (lower it)"
            )
        self._max_tokens = max_tokens or min(known)
        self._model: Any = None

    def load(self) -> None:
        """Loads the weights.

        Raises:
            ValueError: they cannot be loaded, some are missing, or they are not finite.
        """
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self._path,
                config=self._config,
                **{_DTYPE: self._dtype},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many types here
            raise ValueError(
                f"reward.model: {self._path} cannot be loaded: {error} (save it anew with {_SAVE})"
            ) from error
        lacking = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
        if lacking:
            raise ValueError(
                f"reward.model: {self._path} has no weights of the right shape for {', '.join(lacking[:5])}, and "
                "random ones would take their place (name a trained reward model)"
            )
        for name, tensor in model.state_dict().items():
            check_finite(tensor, f"reward.model: {self._path}: {name}", self._finite_unless)
        self._model = model.to(self._device).eval()

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> list[float]:
        if self._model is None:
            self.load()
        rows = [self._row(*pair) for pair in zip(prompts, outputs, metadata, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        rewards = [0.0] * len(rows)
        for members in self._batches(order, [len(ids) for ids, _ in rows]):
            heartbeat()
            for index, value in zip(members, self._scores([rows[i] for i in members]), strict=True):
                rewards[index] = value
        return rewards

    def _row(self, prompt: str, output: str, metadata: dict) -> tuple[list[int], list[int]]:
        """Token ids and token types of one row."""
        messages = messages_of(prompt, metadata)
        if self._template == "chat":
            answer = {"role": "assistant", "content": output}
            ids = self._ended(render_chat(self._tokenizer, [*messages, answer], generation_prompt=False)[1])
            start = self._start if ids[: len(self._start)] == self._start else []
            ids = start + ids[max(len(start), len(ids) - self._max_tokens + len(start)) :]
            return ids, [0] * len(ids)
        if len(messages) != 1:
            raise ValueError(
                f"a prompt of {len(messages)} messages: reward.template={self._template or 'a format string'} takes "
                "one (set reward.template=chat)"
            )
        values = {"prompt": messages[0]["content"], "output": output}
        if self._template == "pair":
            first, second = (self._protected.encoding(values[name]) for name in ("prompt", "output"))
        else:
            first, second = self._protected.encoding(self._format.fill(values, self._protected.alias)), None
        added = self._tokenizer.num_special_tokens_to_add(pair=second is not None) + (self._end is not None)
        room = self._max_tokens - added - (0 if second is None else len(second))
        if self._truncate and len(first) > room:
            if room < 1:
                raise ValueError(f"the output alone fills reward.max_tokens={self._max_tokens} (raise it)")
            first.truncate(room, direction="left")
        whole = self._tokenizer.backend_tokenizer.post_process(first, second)
        ids = self._ended(whole.ids)
        return ids, (whole.type_ids + whole.type_ids[-1:])[: len(ids)]

    def _ended(self, ids: list[int]) -> list[int]:
        """The row with its end token; ValueError where it is empty, or longer than is allowed."""
        if self._end is not None and ids[-1:] != [self._end]:
            ids = [*ids, self._end]
        if not ids:
            raise ValueError("the row is empty: neither prompt nor output has tokens")
        if len(ids) > self._max_tokens and not self._truncate:
            raise ValueError(
                f"{len(ids)} tokens in the reward model's template, more than reward.max_tokens={self._max_tokens} "
                "(set reward.too_long=truncate to cut on the left, or lower data.max_prompt_tokens)"
            )
        return ids

    def _batches(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        """Rows in the order of their length, as many as fit the budget with their padding; one row at least."""
        batches: list[list[int]] = [[]]
        for index in order:
            if batches[-1] and lengths[index] * (len(batches[-1]) + 1) > self._batch_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches

    @torch.no_grad()
    def _scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        longest = max(len(ids) for ids, _ in rows)
        pad = self._pad
        if pad is None:
            # Without one a model scores a row's last token; of a batch, the last one that is not padding. Any token
            # that ends no row makes them the same.
            ends = {ids[-1] for ids, _ in rows}
            pad = next(token for token in itertools.count() if token not in ends)
        self._model.config.get_text_config().pad_token_id = pad
        inputs = {
            "input_ids": [ids + [pad] * (longest - len(ids)) for ids, _ in rows],
            "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows],
        }
        if self._types:
            inputs["token_type_ids"] = [types + [0] * (longest - len(types)) for _, types in rows]
        tensors_BS = {name: torch.tensor(values, device=self._device) for name, values in inputs.items()}
        return self._model(**tensors_BS).logits.float().squeeze(-1).tolist()


def _device(name: str | None) -> torch.device:
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Not the current device: a run sets that later than its reward is made.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"reward.device={name!r} cannot be used: {error} (null: CUDA where there is any)") from error
    return device


def _checked_config(path: Path) -> PretrainedConfig:
    """The model's config.json; ValueError for what a reward cannot be."""
    if not (path / "config.json").is_file():
        raise ValueError(
            f"reward.model: there is no {path / 'config.json'} (give a reward model's Hugging Face directory)"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here, some with a list of all models that it knows
        raise ValueError(f"reward.model: {path / 'config.json'} cannot be read: {str(error)[:300]}") from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"reward.model: {path} is a {config.model_type}, of which transformers knows no sequence classification"
        )
    if config.is_encoder_decoder:
        raise ValueError(f"reward.model: {path} is an encoder-decoder model, which is not supported as a reward")
    if config.num_labels != 1:
        raise ValueError(
            f"reward.model: {path} has {config.num_labels} labels, a reward model has one (name another model; "
            "id2label in its config.json lists the labels)"
        )
    text = config.get_text_config()
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < text.vocab_size:
        text.pad_token_id = None  # no token at all: -1 is written for none
    try:
        weight_files(path)
    except ValueError as error:
        raise ValueError(f"reward.model: {error} (safetensors alone are read; make them: {_SAVE})") from error
    return config
