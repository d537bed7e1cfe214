"""What an inference engine says of an output, in the form of OpenAI's completions, and whether it can be so."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Output, Prompt
from nemo_brain.core.http import BadAnswer

if TYPE_CHECKING:
    from nemo_brain.sampling.sampler import SamplingOptions

_TOKEN_ID = re.compile(r"token_id:(\d+)")
_ROUNDING = 1e-3  # a log-prob may exceed 0 by this: fp32, or bf16 on the server
_IMPOSSIBLE = -9999.0  # how servers write minus infinity in JSON


class Reader:
    """Reads outputs that were asked for with these options, of a model with so many tokens."""

    def __init__(self, options: SamplingOptions, tokenizer: PreTrainedTokenizerFast, vocab_size: int):
        self._options, self._tokenizer, self._vocab_size = options, tokenizer, vocab_size

    def output(self, choice: dict[str, Any], prompt: Prompt) -> tuple[Output, float]:
        """The output in a choice, and the sum of its log-probs. BadAnswer: anything about it cannot be."""
        try:
            logprobs = choice["logprobs"]
            values = logprobs["token_logprobs"]
            reason = choice["finish_reason"]
            ids = choice.get("token_ids")
            if ids is None:
                ids = [_token_id(token) for token in logprobs["tokens"]]
            lengths = len(ids), len(values)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadAnswer(
                f"no token ids with log-probs in {str(choice)[:200]} (rollout.remote.server says which server it is; "
                "older versions of it may lack them)"
            ) from None
        if choice.get("prompt_token_ids") not in (None, prompt.token_ids):
            raise BadAnswer("the server sampled from another prompt: its prompt_token_ids are not those that were sent")
        if lengths[0] != lengths[1] or not 1 <= lengths[0] <= self._options.max_new_tokens:
            raise BadAnswer(
                f"{lengths[0]} token ids and {lengths[1]} log-probs; as many of both are expected, between 1 and "
                f"rollout.max_new_tokens={self._options.max_new_tokens}"
            )
        for token in ids:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise BadAnswer(f"token id {token!r} is not in the vocabulary of {self._vocab_size} tokens")
        for value in values:
            if type(value) not in (int, float) or not _IMPOSSIBLE < value <= _ROUNDING:
                raise BadAnswer(f"{value!r} is not the log-prob of a sampled token")
        stop = self._options.stop
        output = stop.output(self._tokenizer, ids)
        if early := sorted(set(ids[:-1]) & set(stop.token_ids)):
            raise BadAnswer(f"the end token {early[0]} stands before the end of the output {ids}")
        if stop.strings and ids[:-1] and stop.ended(self._tokenizer, ids[:-1]):
            raise BadAnswer(f"the output goes on behind one of rollout.stop_strings={list(stop.strings)}: {ids}")
        if reason not in ("stop", "length"):
            raise BadAnswer(f"finish_reason is {reason!r}, neither 'stop' nor 'length'")
        if reason == "stop" and not output.ended:
            raise BadAnswer(
                f"the server stopped at token {ids[-1]}, which is none of the end tokens {list(stop.token_ids)}: it "
                "stops at other tokens too (eos_token_id in the served config.json or generation_config.json; "
                "rollout.stop_token_ids names them)"
            )
        if reason == "length" and not output.ended and len(ids) < self._options.max_new_tokens:
            raise BadAnswer(
                f"the output was cut after {len(ids)} of rollout.max_new_tokens={self._options.max_new_tokens} tokens: "
                "the server's context is too short"
            )
        return output, math.fsum(values)


def _token_id(token: str) -> int:
    """The number in "token_id:123". AttributeError: it is none of these."""
    return int(_TOKEN_ID.fullmatch(token)[1])  # type: ignore[index]  # the caller takes it for a malformed answer
