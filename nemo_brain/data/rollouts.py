"""Rollout files: prompts with scored outputs, written by a run or by any sampler, read by offline training."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from nemo_brain.core.groups import Group, Output, Prompt, Rollout
from nemo_brain.data.prompts import parse_prompt, prompt_id, prompt_reference
from nemo_brain.data.records import Record, Source, kind, read_records
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
        outputs = [output for output in group.outputs if output.reward is None or math.isfinite(output.reward)]
        if len(outputs) < min(2, len(group.outputs)):
            continue
        line = {
            **{name: value for name, value in prompt.metadata.items() if name not in OWN_KEYS},
            "id": prompt.id,
            "prompt": prompt.text,
            "prompt_token_ids": prompt.token_ids,
            "reference": prompt.reference,
            "iteration": rollout.iteration,
            "outputs": [
                {name: getattr(output, name) for name in ("text", "token_ids", *SCORES, "ended")} for output in outputs
            ],
        }
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_rollouts(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    max_prompt_tokens: int,
    max_new_tokens: int,
    key: str = "data.train",
) -> list[Group]:
    """Reads groups.

    A record is a prompt's (``load_prompts``) with ``outputs``, at least two. An output has ``text`` and may have:

    - ``token_ids``, the end token included if the model emitted it; without them the text is tokenised, and the end
      token appended if the output ended;
    - ``ended``; without it, whether ``token_ids`` end with the tokenizer's end token, or true for text alone;
    - ``reward``, ``prior_logprob``, ``proposal_logprob``: on all outputs of the record or on none.

    With ``prompt_token_ids`` the prompt is taken as it stands; without them the template is applied to it. Groups are
    told apart by id, never by text. The same id may come again with another ``iteration``. Within one file and one
    iteration the later line replaces the earlier: a resumed run repeats the iteration that it was stopped in. Otherwise
    a repeated id is an error. Nothing is truncated: scores belong to the whole prompt and the whole output.

    Args:
        source: a JSONL file, a list of them, or an iterable of records.
        tokenizer: the model's tokenizer.
        template: see ``Template``.
        max_prompt_tokens: the longest prompt.
        max_new_tokens: the longest output, end token included.
        key: the configuration key that errors name.

    Raises:
        ValueError: naming ``path:line`` or the key, what is wrong and the remedy.
    """
    rendering = Template(tokenizer, template)
    groups: dict[tuple, Group] = {}
    places: dict[tuple, str] = {}
    for record in read_records(source, key):
        prompt = _prompt(record, rendering, max_prompt_tokens, len(tokenizer))
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
        groups[slot] = Group(prompt, _outputs(record, tokenizer, max_new_tokens))
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


def _outputs(record: Record, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int) -> list[Output]:
    items = record.fields.get("outputs")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise record.error("outputs is not a list of objects", 'write "outputs": [{"text": "..."}, {"text": "..."}]')
    if len(items) < 2:
        raise record.error(f"{len(items)} outputs", "give at least two outputs per prompt: they are compared")
    for name in SCORES:
        given = sum(item.get(name) is not None for item in items)
        if given not in (0, len(items)):
            raise record.error(
                f"{name} on {given} of {len(items)} outputs", f"give {name} on all outputs of a record or on none"
            )
    return [_output(record, f"outputs[{i}]", item, tokenizer, max_new_tokens) for i, item in enumerate(items)]


def _output(record: Record, name: str, item: dict, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int) -> Output:
    text = record.text(f"{name}.text", item.get("text"))
    ended = item.get("ended")
    if ended is not None and type(ended) is not bool:
        raise record.error(f"{name}.ended is {kind(ended)}, not a boolean", "write true, false or leave it out")
    if item.get("token_ids") is not None:
        ids = record.token_ids(f"{name}.token_ids", item["token_ids"], len(tokenizer))
        ended = ids[-1] == tokenizer.eos_token_id if ended is None else ended
    else:
        ids = encode(tokenizer, text)
        if not ids:
            raise record.error(f"{name} is empty", f"give token_ids ([{tokenizer.eos_token_id}] if it ended at once)")
        ended = ended is not False
        ids += [tokenizer.eos_token_id] * ended
    if len(ids) > max_new_tokens:
        raise record.error(
            f"{name} has {len(ids)} tokens, more than rollout.max_new_tokens={max_new_tokens}",
            "raise it or remove the output",
        )
    output = Output(ids, text, ended)
    for score in SCORES:
        if item.get(score) is not None:
            setattr(output, score, record.number(f"{name}.{score}", item[score]))
    for score in ("prior_logprob", "proposal_logprob"):
        if (getattr(output, score) or 0.0) > LOGPROB_SLACK:
            raise record.error(f"{name}.{score} is positive", "write the sum of log-probs in nats, which is at most 0")
    return output
