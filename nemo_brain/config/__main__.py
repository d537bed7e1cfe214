"""Writes what the keys' fields say into the comments of ``conf/*.yaml`` and into ``docs/configuration.md``.

python -m nemo_brain.config
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from nemo_brain.config.brain import Config
from nemo_brain.config.calibrate import CalibrationConfig
from nemo_brain.config.common import TrainingConfig
from nemo_brain.config.evaluate import EvaluationConfig
from nemo_brain.config.reward_model import RewardConfig
from nemo_brain.config.schema import Never, Unless, keys, resume_rule, rules
from nemo_brain.config.serve_reward import ServeConfig
from nemo_brain.config.sft import SFTConfig

ROOT = Path(__file__).resolve().parents[2]
# The files that state every key, with what they configure.
FILES = {
    "conf/brain.yaml": (Config, "BRAIn: `nemo-brain train`"),
    "conf/sft.yaml": (SFTConfig, "Supervised fine-tuning: `nemo-brain sft`"),
    "conf/reward_model.yaml": (RewardConfig, "Reward models: `nemo-brain reward-model`"),
    "conf/evaluate.yaml": (EvaluationConfig, "Evaluation: `nemo-brain evaluate`"),
    "conf/calibrate.yaml": (CalibrationConfig, "Calibration: `nemo-brain calibrate`"),
    "conf/serve_reward.yaml": (ServeConfig, "The reward server: `nemo-brain serve-reward`"),
}
PAGE = "docs/configuration.md"
INTRODUCTION = """\
# Configuration

Every key, by the file that states it. `python -m nemo_brain.config` writes this page, and the comments of those files,
from the fields in `nemo_brain/config/`. The defaults are the file's; `???` has none and must be given. The last column
says whether a run that is resumed from a checkpoint may have another value ([checkpoints.md](checkpoints.md)); what is
below a key that may change, may too.
"""
COLUMN, WIDTH = 31, 128  # of the comments


def contents() -> dict[str, str]:
    """The files that are written, by their paths from the root of the repository."""
    written = {file: _commented((ROOT / file).read_text(encoding="utf-8"), kind) for file, (kind, _) in FILES.items()}
    tables = [f"\n## {title}, `{file}`\n\n{_table(file, kind)}" for file, (kind, title) in FILES.items()]
    return {**written, PAGE: INTRODUCTION + "".join(tables)}


def _commented(text: str, kind: type) -> str:
    """A YAML file with its keys' comments. Those of keys without a field, as in ``optim``, stay as they are."""
    comments = {name: _comment(item, section) for name, item, section in keys(kind)}
    lines: list[str] = []
    path: list[str] = []
    replacing = False
    for line in text.splitlines():
        if replacing and re.fullmatch(rf" {{{COLUMN}}}#.*", line):
            continue  # the rest of a comment that is written anew
        replacing = False
        if stated := re.match(r"( *)(\w+):", line):
            path = [*path[: len(stated[1]) // 2], stated[2]]
            if comment := comments.get(".".join(path)):
                replacing = True
                line = textwrap.fill(
                    comment,
                    WIDTH,
                    initial_indent=f"{line.partition(' #')[0].rstrip():<{COLUMN - 1}} # ",
                    subsequent_indent=" " * COLUMN + "# ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comment(item: dataclasses.Field[Any], section: type | None) -> str:
    """Of a section that is null by default its keys too, which the file does not state."""
    if section is None or item.default is dataclasses.MISSING:
        return rules(item).comment
    return f"{rules(item).comment}: {{{', '.join(_example(inner) for _, inner, _ in keys(section))}}}"


def _example(item: dataclasses.Field[Any]) -> str:
    """A key with its choices, its default, or what must be given."""
    rule, value = rules(item), _default(item)
    choices = None if isinstance(value, list) else rule.choices
    return f"{item.name}: {choices or (rule.doc if value == MISSING else _flow(value))}"


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _flow(value: Any) -> str:
    """In YAML, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip().replace(f"'{MISSING}'", MISSING)


def _table(file: str, kind: type) -> str:
    stated = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    heads = ["key", "type", "default", "bounds", "meaning"]
    if issubclass(kind, TrainingConfig):
        heads.append("may change on resume")
    rows = [heads, ["---"] * len(heads)]
    order = list(stated)
    for name, item, section in sorted(keys(kind), key=lambda found: order.index(found[0].partition(".")[0])):
        rule, value = rules(item), _value(stated, name, item)
        words = "section" if section is not None else f"`{item.type}`".replace("None", "null")
        default = "" if section is not None and value is not None else f"`{_flow(value)}`"
        bounds = "" if rule.among is not None else rule.bounds
        cells = [f"`{name}`", words, default, bounds, rule.comment, _resumption(resume_rule(kind, name), section)]
        rows.append([cell.replace("|", "\\|") for cell in cells[: len(heads)]])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _value(stated: Any, name: str, item: dataclasses.Field[Any]) -> Any:
    """What the file states for a key; the default for those of a section that is null there."""
    for part in name.split("."):
        if stated is None:
            return _default(item)
        stated = stated[part]
    return stated


def _resumption(rule: bool | Unless | Never, section: type | None) -> str:
    if isinstance(rule, Unless):
        return f"unless `{rule.other}` is set"
    if isinstance(rule, Never):
        return "never"
    return "yes" if rule else "no" if section is None else ""


def main() -> None:
    for file, text in contents().items():
        (ROOT / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
