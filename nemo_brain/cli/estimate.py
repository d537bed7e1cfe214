"""``nemo-brain estimate``: which layouts of a model fit which cards, and how long an iteration should take.

nemo-brain estimate model=llama-8b gpus=8
nemo-brain estimate model=/path/to/model gpus=16 card=a100-80gb prompt=400 output=128 n=16 lora=true
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from nemo_brain.cli.cost import CARDS, MODELS, Card, Model, Plan, Rates, Work, best, memory, peak, plans, seconds
from nemo_brain.config.schema import did_you_mean
from nemo_brain.report.text import duration

_NUMBERS = {"gpus": 8, **{item.name: int(str(item.default)) for item in dataclasses.fields(Work)}}
_CHOICES = {"card": tuple(CARDS), "lora": ("true", "false"), "refresh": ("always", "never", "kl_adaptive")}
_KEYS = ("model", *_CHOICES, *_NUMBERS)
_SHOWN = 8
USAGE = f"""\
nemo-brain estimate model=MODEL [KEY=VALUE ...]

  model           {" | ".join(MODELS)}, or what model.restore_from takes
  card            {" | ".join(CARDS)} (h100)
  gpus            of all nodes together, 8 on each (8)
  lora            true: adapters instead of all weights (false)
  refresh         rollout.refresh (always); with kl_adaptive the proposal has weights of its own
  groups          prompts of an iteration (512)
  batch           groups of an optimizer step (64)
  prompt, output  tokens (1024, 512)
  n               outputs per prompt (8)
  rows_in_flight  outputs sampled at a time by each replica (256)

Memory and time are calculated, for bf16-mixed with the distributed optimizer: docs/estimates.md."""


def main(arguments: Sequence[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    try:
        print("\n".join(estimate(arguments)))
    except ValueError as error:
        sys.exit(f"error: {error}")


def estimate(arguments: Sequence[str]) -> list[str]:
    """The lines to print. ValueError: names what is wrong with an argument and the remedy."""
    given = _parse(arguments)
    model, card = _model(given["model"]), CARDS[given.get("card", "h100")]
    lora, adaptive = given.get("lora") == "true", given.get("refresh") == "kl_adaptive"
    numbers = {name: int(given.get(name, default)) for name, default in _NUMBERS.items()}
    gpus = numbers.pop("gpus")
    work, rates = Work(**numbers), Rates()
    if work.groups % work.batch:
        raise ValueError(f"groups={work.groups} must be a multiple of batch={work.batch}")
    fitting = best(model, work, gpus, card, rates, lora, adaptive)
    cards = f"{gpus} x {given.get('card', 'h100')}"
    outputs = f"prompts of {work.prompt}, {work.n} outputs of {work.output} tokens"
    lines = [
        f"{given['model']}: {model.parameters / 1e9:.3g}e9 parameters; {cards}; an iteration of {work.groups} groups: "
        f"{outputs}, {work.batch} groups per step",
        "Calculated, not measured: arithmetic with what one H100 showed (docs/estimates.md). Rewards are not counted.",
        "",
    ]
    if not fitting:
        return lines + _nothing_fits(plans(model, work, gpus, lora, adaptive), model, work, gpus, card, rates, lora)
    lines.append(
        f"{'TP x PP x DP':<14}{'GB of ' + f'{card.memory / 1e9:g}':>12}{'sampling':>14}{'scoring':>14}{'training':>14}"
        f"{'iteration':>14}  keeps less by"
    )
    for plan in fitting[:_SHOWN]:
        parts = seconds(model, work, plan, card, rates)
        held = peak(memory(model, work, plan, rates)) / 1e9
        times = [duration(value) for value in (*parts.values(), sum(parts.values()))]
        split = f"{plan.tensor} x {plan.pipeline} x {plan.data}"
        lines.append(
            f"{split:<14}{held:>12.0f}{times[0]:>14}{times[1]:>14}{times[2]:>14}{times[3]:>14}  {_savings(plan) or '-'}"
        )
    quickest = fitting[0]
    sizes = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory(model, work, quickest, rates).items() if size)
    return [
        *lines,
        "",
        f"Most on one GPU with {quickest.tensor} x {quickest.pipeline} x {quickest.data}, GB: {sizes}",
        "(activations while training, the cache while sampling: not at the same time).",
        "",
        *_keys(quickest, work, lora, given.get("refresh", "always")),
    ]


def _keys(plan: Plan, work: Work, lora: bool, refresh: str) -> list[str]:
    """How a run is told of a plan."""
    tokens = work.positions() if plan.shared else work.row
    keys = [
        "trainer.precision=bf16-mixed optim.use_distributed_optimizer=true",
        f"model.tensor_model_parallel_size={plan.tensor} model.pipeline_model_parallel_size={plan.pipeline}",
        f"train.micro_batch_tokens={tokens} train.layout={'shared_prefix' if plan.shared else 'separate_rows'}",
    ]
    if plan.tensor > 1:
        keys[1] += " model.sequence_parallel=true"
    more = [f"prior.placement={plan.prior}", *(["model.recompute=full"] if plan.recompute else [])]
    return [
        "Keys of the first line:",
        *(f"  {line}" for line in (*keys, " ".join(more))),
        *(["  '+model.peft={dim: 32}'"] if lora else []),
        *([f"  rollout.refresh={refresh}"] if refresh != "always" else []),
    ]


def _savings(plan: Plan) -> str:
    named = [
        (plan.prior == "offload", "prior offloaded"),
        (plan.recompute, "full recompute"),
        (not plan.shared, "an output per micro-batch, two passes"),
    ]
    return ", ".join(words for applies, words in named if applies)


def _nothing_fits(
    possible: list[Plan], model: Model, work: Work, gpus: int, card: Card, rates: Rates, lora: bool
) -> list[str]:
    if not possible:
        shape = f"{model.layers} layers and {model.kv_heads} key-value heads"
        return [f"No split of {shape} uses {gpus} GPUs: try another number."]
    least = min(possible, key=lambda plan: peak(memory(model, work, plan, rates)))
    needed = peak(memory(model, work, least, rates)) / 1e9
    remedy = "take more or larger cards" if lora else "take more or larger cards, or lora=true"
    split = f"{least.tensor} x {least.pipeline} x {least.data}"
    room = f"{needed:.0f} GB of {card.memory / 1e9:g} on a GPU, of which {rates.usable:.0%} are usable"
    return [f"Nothing fits: {split} needs least, {room}: {remedy}, or shorter or fewer outputs in flight."]


def _model(name: str) -> Model:
    if name in MODELS:
        return MODELS[name]
    from nemo_brain.host import cpu

    cpu.enable()

    from nemo_brain.convert.open import open_weights
    from nemo_brain.model.gpt import PackedGPTConfig

    try:
        weights = open_weights(name)
    except ValueError as error:
        raise ValueError(f"model: {error}; or name one of {', '.join(MODELS)}") from error
    return Model.of(PackedGPTConfig(**{"vocab_size": weights.vocab_size, **weights.gpt_config}))


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in _KEYS or not value:
            raise ValueError(
                f"{argument!r} is not one of {', '.join(f'{k}=...' for k in _KEYS)}{did_you_mean(key, _KEYS)}"
            )
        if key in given:
            raise ValueError(f"{key} is given twice")
        if key in _NUMBERS and not (value.isascii() and value.isdigit() and int(value) > 0):
            raise ValueError(f"{key} must be a number above 0, not {value!r}")
        given[key] = value
    if "model" not in given:
        raise ValueError(f"model is missing: name one of {', '.join(MODELS)}, or a path. nemo-brain estimate --help")
    for key, among in _CHOICES.items():
        if given.get(key, among[0]) not in among:
            raise ValueError(f"{key} must be one of {', '.join(among)}, not {given[key]!r}")
    return given
