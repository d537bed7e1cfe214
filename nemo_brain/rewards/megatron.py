"""The Megatron reward model as a run's reward: split over the policy's ranks, which score in step after sampling.

Shapes: G groups, N outputs per group.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerFast

from nemo_brain.convert.reward import PADDING, open_reward_model
from nemo_brain.core.groups import Group, Output
from nemo_brain.data.stop import choose_stop
from nemo_brain.data.templates import Template
from nemo_brain.data.tokenizers import encode
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.model.reward_passes import RewardPasses
from nemo_brain.model.weights import Weights


class ModelHost(Protocol):
    """What the strategy of the policy offers to a model that stands beside it; see ``training.strategy``."""

    layout: str
    micro_batch_tokens: int

    def with_parallel_layout(self, config: PackedGPTConfig) -> PackedGPTConfig: ...

    def build_frozen_chunks(self, config: PackedGPTConfig, weights: Weights) -> list[torch.nn.Module]: ...


class MegatronReward:
    """A ``CollectiveReward``: a reward model with the policy's parallel layout, in host memory while it is idle.

    The policy's token ids are scored as they are where its tokenizer and template are the reward model's own. Otherwise
    messages (``data.template=chat`` on both sides) or plain prompts (``data.template=null``) are rendered and tokenised
    anew, outputs from their text. An output that did not end has no end token then either; one that did has that which
    the reward model's own data ended with.

    Args:
        restore_from: the directory of a reward model, see ``convert.reward.open_reward_model``.
        template: how the reward model's prompts are rendered, as ``data.template``; None: as its directory says.
        allow_nonfinite: weights that are not finite are taken rather than refused.

    Raises:
        ValueError: there is no reward model, or its template is none.
    """

    collective = True

    def __init__(self, restore_from: str, template: str | None = None, allow_nonfinite: bool = False):
        self.name = f"MegatronReward of {restore_from}"
        self.weights = open_reward_model(restore_from, "reward.restore_from", allow_nonfinite)
        self._template = self.weights.template if template is None else template
        self._rendering = Template(self.weights.tokenizer, self._template)
        self._stop = choose_stop(
            self.weights.tokenizer,
            self.weights.stop_token_ids,
            self._template,
            vocab_size=self.weights.vocab_size,
        )
        self._fit: _Fit | None = None  # until it is configured
        self._model: _OffloadedModel | None = None  # until it is set up

    def configure(self, gpt: RewardGPTConfig, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        """Takes the reward model's configuration, and the policy's tokenizer and template.

        Raises:
            ValueError: neither can the policy's token ids be scored, nor its prompts be rendered anew.
        """
        own = self.weights.tokenizer
        same_tokens = template == self._template and same_tokenizer(tokenizer, own)
        if template == "chat" and tokenizer.chat_template != own.chat_template:
            same_tokens = False
        if not same_tokens and template is not None and not template == self._template == "chat":
            raise ValueError(
                f"data.template={template!r} renders prompts for another tokenizer or template than {self.name} has "
                f"(template={self._template!r}), and only messages and plain prompts can be rendered anew: use chat "
                "with both, or data.template=null"
            )
        self._fit = _Fit(gpt, same_tokens, rendered=template == "chat")

    def setup(self, strategy: ModelHost) -> None:
        """Builds this rank's chunks."""
        assert self._fit is not None, "the reward has not been configured"
        chunks = strategy.build_frozen_chunks(strategy.with_parallel_layout(self._fit.gpt), self.weights)
        passes = RewardPasses(self._fit.gpt, strategy.layout, strategy.micro_batch_tokens)
        self._model = _OffloadedModel(chunks, passes)

    def score(self, groups: Sequence[Group], alone: bool) -> list[list[float]]:
        """The rewards of every output; see ``CollectiveReward``."""
        if not groups:
            return []
        assert self._model is not None, "the reward has not been set up"
        rewards_GN = self._model.rewards([self._own(group) for group in groups], alone)
        return [
            [reward - self.weights.mean for reward in rewards[: len(group.outputs)]]
            for group, rewards in zip(groups, rewards_GN.tolist(), strict=True)
        ]

    def _own(self, group: Group) -> Group:
        """The group in the reward model's tokens, prompts cut on the left and outputs on the right to its positions."""
        assert self._fit is not None, "the reward has not been configured"
        prompt_ids, outputs = group.prompt.token_ids, [self._as_ended(output) for output in group.outputs]
        start: list[int] = []
        if not self._fit.same_tokens:
            if self._fit.rendered:
                if "messages" not in group.prompt.metadata:
                    raise ValueError(
                        f"the prompt {group.prompt.id!r} came as token ids, without messages for {self.name} "
                        "to render anew: give messages, or use the policy's tokenizer and template for both"
                    )
                _, start, prompt_ids = self._rendering.render_messages(group.prompt.metadata["messages"])
            else:
                _, start, prompt_ids = self._rendering.render_prompt(group.prompt.text)
            outputs = [self._tokens(output) for output in group.outputs]
        most = self._fit.gpt.seq_length
        outputs = [ids[: most - len(start) - 1] for ids in outputs]
        room = most - len(start) - max(map(len, outputs))
        return Group(
            replace(group.prompt, token_ids=start + prompt_ids[-room:]),
            [replace(output, token_ids=ids) for output, ids in zip(group.outputs, outputs, strict=True)],
        )

    def _as_ended(self, output: Output) -> list[int]:
        """The policy's tokens, ended as the reward model knows it."""
        if not output.ended or output.token_ids[-1] == self._stop.end:
            return output.token_ids
        if output.token_ids[-1] in self._stop.token_ids:
            return [*output.token_ids[:-1], *self._stop.given(self.weights.tokenizer, "")]
        return self._tokens(output)  # it ended with a string

    def _tokens(self, output: Output) -> list[int]:
        tokenizer = self.weights.tokenizer
        ids = encode(tokenizer, output.text)
        # An output has at least one token to read the reward at.
        return self._stop.given(tokenizer, output.text) if output.ended or not ids else ids


@dataclass(frozen=True)
class _Fit:
    """How the reward model goes with the policy.

    Args:
        gpt: the reward model's configuration.
        same_tokens: the policy's token ids are the reward model's own.
        rendered: the text of prompts is that of the policy's chat template.
    """

    gpt: RewardGPTConfig
    same_tokens: bool
    rendered: bool


class _OffloadedModel:
    """This rank's chunks, in host memory but for the passes."""

    def __init__(self, chunks: list[torch.nn.Module], passes: RewardPasses):
        self._chunks = chunks
        self._passes = passes
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._device = self._parameters[0].device
        self._host = [_to_host(parameter.data) for parameter in self._parameters]
        self._leave()

    def rewards(self, groups: Sequence[Group], alone: bool) -> torch.Tensor:
        """Rewards [G, N], see ``RewardPasses``."""
        with self._resident():
            return self._passes.rewards(self._chunks, groups, alone=alone)

    @contextlib.contextmanager
    def _resident(self) -> Iterator[None]:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        # The weights do not change: nothing is copied back.
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether every text has the same ids, and the same id ends an output."""
    return _law(one) == _law(other)


def _law(tokenizer: PreTrainedTokenizerFast) -> tuple:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token in state["added_tokens"] if token["content"] != PADDING]  # which no text and template has
    added = sorted((token["id"], token["content"], token["special"]) for token in tokens)
    parts = [state[name] for name in ("normalizer", "pre_tokenizer", "model")]
    return tokenizer.eos_token_id, added, parts


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor
