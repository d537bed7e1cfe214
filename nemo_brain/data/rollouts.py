"""Rollout files: prompts with scored outputs, written by a run or by any sampler, read by offline training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Group, Output, Prompt, RewardedGroup, Rollout, SampledGroup
from nemo_brain.data.prompts import parse_prompt, prompt_id, prompt_reference
from nemo_brain.data.records import Record, Source, kind, read_records
from nemo_brain.data.stop import Stop
from nemo_brain.data.templates import Template
from nemo_brain.data.tokenizers import encode

SCORES = ("reward", "prior_logprob", "proposal_logprob")
OWN_KEYS = ("id", "prompt", "prompt_token_ids", "reference", "iteration", "outputs")
# Log-probs are sums of rounded numbers: one of probability 1 may come out a little above 0.
LOGPROB_SLACK = 1e-3


def write_rollout(path: str | Path, rollout: Rollout) -> None:
    """Appends one line per group. ``prompt_token_ids`` tell a reader that the template was applied to ``prompt``.

    Outputs whose reward is not finite are left out, as in training, and groups that fewer than two others are left of.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for group in rollout.groups:
        prompt = group.prompt
        outputs = [output for output in _with_scores(group) if math.isfinite(output["reward"] or 0.0)]
        if len(outputs) < min(2, len(group.outputs)):
            continue
        line = {
            **{name: value for name, value in prompt.metadata.items() if name not in OWN_KEYS},
            "id": prompt.id,
            "prompt": prompt.text,
            "prompt_token_ids": prompt.token_ids,
            "reference": prompt.reference,
            "iteration": rollout.iteration,
            "outputs": outputs,
        }
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def _with_scores(group: Group) -> list[dict]:
    scores = {name: getattr(group, f"{name}s", None) or [None] * len(group.outputs) for name in SCORES}
    steps = getattr(group, "policy_steps", None)
    return [
        {
            "text": output.text,
            "token_ids": output.token_ids,
            **{name: values[i] for name, values in scores.items()},
            "ended": output.ended,
            **({"policy_step": steps[i]} if steps else {}),
        }
        for i, output in enumerate(group.outputs)
    ]


def read_rollouts(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerFast,
    stop: Stop,
    template: str | None,
    max_prompt_tokens: int,
    max_new_tokens: int,
    vocab_size: int | None = None,
    key: str = "data.train",
) -> list[SampledGroup]:
    """Reads groups; those with rewards are ``RewardedGroup``s.

    A record is a prompt's (``load_prompts``) with ``outputs``, at least two. An output has ``text`` and may have:

    - ``token_ids``, the end token included if the model emitted it; without them the text is tokenised, and the end
      token appended if the output ended;
    - ``ended``; without it, whether ``token_ids`` end as ``stop`` says, or true for text alone;
    - ``reward``, ``prior_logprob``, ``proposal_logprob``: on all outputs of the record or on none.

    With ``prompt_token_ids`` the prompt is taken as it stands; without them the template is applied to it. Groups are
    told apart by id, never by text. The same id may come again with another ``iteration``. Within one file and one
    iteration the later line replaces the earlier: a resumed run repeats the iteration that it was stopped in. Otherwise
    a repeated id is an error. Nothing is truncated: scores belong to the whole prompt and the whole output.

    Args:
        source: a JSONL file, a list of them, or an iterable of records.
        tokenizer: the model's tokenizer.
        stop: what ends the outputs.
        template: see ``Template``.
        max_prompt_tokens: the longest prompt.
        max_new_tokens: the longest output, end token included.
        vocab_size: rows of the embedding, which may be more than the tokenizer has tokens; None: they are as many.
        key: the configuration key that errors name.

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    vocab_size = vocab_size or len(tokenizer)
    groups: dict[tuple, SampledGroup] = {}
    places: dict[tuple, str] = {}
    for record in read_records(source, key):
        prompt = _prompt(record, rendering, max_prompt_tokens, vocab_size)
        iteration = record.fields.get("iteration")
        if iteration is not None and type(iteration) is not int:
            raise record.error(f"iteration is {kind(iteration)}, not an integer", "make it an integer or leave it out")
        slot = (prompt.id,) if iteration is None else (prompt.id, record.source, iteration)
        if iteration is None and slot in groups:
            raise record.error(
                f"the id {prompt.id!r} was used before, at {places[slot]}",
                "give every group an id of its own, or put all outputs of a prompt in one record",
            )
        places[slot] = record.where
        groups[slot] = _group(record, prompt, tokenizer, stop, max_new_tokens, vocab_size)
    return list(groups.values())


def _prompt(record: Record, template: Template, max_prompt_tokens: int, vocabulary: int) -> Prompt:
    if record.fields.get("prompt_token_ids") is None:
        plain = {name: value for name, value in record.fields.items() if name not in ("outputs", "iteration")}
        plain_record = Record(record.where, record.source, record.default_id, plain)
        prompt = parse_prompt(plain_record, template, max_prompt_tokens)
        too_long = prompt.truncated
    else:
        ids = record.token_ids("prompt_token_ids", record.fields["prompt_token_ids"], vocabulary)
        metadata = {name: value for name, value in record.fields.items() if name not in OWN_KEYS}
        text = record.text("prompt", record.fields.get("prompt"))
        prompt = Prompt(prompt_id(record), text, ids, prompt_reference(record), metadata)
        too_long = len(ids) > max_prompt_tokens
    if too_long:
        raise record.error(
            f"the prompt is longer than data.max_prompt_tokens={max_prompt_tokens}", "raise it or remove the line"
        )
    return prompt


def _group(
    record: Record,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerFast,
    stop: Stop,
    max_new_tokens: int,
    vocab_size: int,
) -> SampledGroup:
    items = record.fields.get("outputs")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise record.error("outputs is not a list of objects", 'write "outputs": [{"text": "..."}, {"text": "..."}]')
    if len(items) < 2:
        raise record.error(f"{len(items)} outputs", "give at least two outputs per prompt: they are compared")
    scores: dict[str, Any] = {}
    for name in SCORES:
        given = sum(item.get(name) is not None for item in items)
        if given not in (0, len(items)):
            raise record.error(
                f"{name} on {given} of {len(items)} outputs", f"give {name} on all outputs of a record or on none"
            )
        if given:
            scores[f"{name}s"] = [_score(record, f"outputs[{i}].{name}", item[name]) for i, item in enumerate(items)]
    outputs = [
        _output(record, f"outputs[{i}]", item, tokenizer, stop, max_new_tokens, vocab_size)
        for i, item in enumerate(items)
    ]
    return (RewardedGroup if "rewards" in scores else SampledGroup)(prompt, outputs, **scores)


def _score(record: Record, name: str, value: object) -> float:
    number = record.number(name, value)
    if name.endswith("_logprob") and number > LOGPROB_SLACK:
        raise record.error(f"{name} is positive", "write the sum of log-probs in nats, which is at most 0")
    return number


def _output(
    record: Record,
    name: str,
    item: dict,
    tokenizer: PreTrainedTokenizerFast,
    stop: Stop,
    max_new_tokens: int,
    vocab_size: int,
) -> Output:
    text = record.text(f"{name}.text", item.get("text"))
    ended = item.get("ended")
    if ended is not None and type(ended) is not bool:
        raise record.error(f"{name}.ended is {kind(ended)}, not a boolean", "write true, false or leave it out")
    if item.get("token_ids") is not None:
        ids = record.token_ids(f"{name}.token_ids", item["token_ids"], vocab_size)
        ended = stop.ended(tokenizer, ids) if ended is None else ended
    else:
        ids = encode(tokenizer, text)
        if not ids:
            raise record.error(f"{name} is empty", f"give token_ids ([{stop.end}] if it ended at once)")
        ended = ended is not False
        if ended:
            if stop.end is None:
                raise record.error(
                    f"{name} ended, but rollout.stop_token_ids names no token that it ends with",
                    'give token_ids, or "ended": false',
                )
            ids.append(stop.end)
    if len(ids) > max_new_tokens:
        raise record.error(
            f"{name} has {len(ids)} tokens, more than rollout.max_new_tokens={max_new_tokens}",
            "raise it or remove the output",
        )
    return Output(ids, text, ended)
