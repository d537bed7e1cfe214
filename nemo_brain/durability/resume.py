"""Which checkpoint a run goes on from, and whether its configuration lets it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_brain.config.common import TrainingConfig
from nemo_brain.config.schema import Never, Unless, resume_rule
from nemo_brain.durability import checkpoint
from nemo_brain.model.fields import HONOURED
from nemo_brain.report.run_dir import read_status

# Fields below keys that may change, which say what is computed all the same.
_FIXED = {"model.options": HONOURED, "ddp": frozenset({"grad_reduce_in_fp32", "fp8_param_gather"})}


def candidates(run_dir: Path, resume: str, steps: int) -> list[Path]:
    """The checkpoints to go on from, the best first; [] for a new run. For rank 0.

    ``auto`` takes those in ``run_dir`` unless the run there has ended; a path is one checkpoint or a directory of them.

    Args:
        resume: ``checkpoint.resume``.
        steps: optimizer steps of the whole run.

    Raises:
        ValueError: ``checkpoint.resume`` names a path without a checkpoint.
    """
    if resume == "never":
        return []
    if resume == "auto":
        ended = read_status(run_dir)
        finished = ended.get("state") == "finished" and ended.get("step", 0) >= steps
        return [] if finished else checkpoint.complete(run_dir / "checkpoints")
    if found := checkpoint.find(Path(resume)):
        return found
    raise ValueError(f"checkpoint.resume={resume} is no checkpoint and holds none: give one, auto or never")


def check_configuration(config: TrainingConfig, path: Path, now: Mapping[str, Any]) -> list[str]:
    """Compares a checkpoint's configuration with the run's. What may differ is said at the keys' fields.

    Args:
        config: the run's configuration.
        path: the checkpoint.
        now: ``config`` as a dictionary.

    Returns:
        The keys that differ, described.

    Raises:
        ValueError: a key differs that changes what is computed and is not among ``checkpoint.allow_changes``.
    """
    try:
        before = flatten(checkpoint.read_json(path / "run.json")["configuration"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint.resume: {path}/run.json cannot be read: {error}") from error
    after = flatten(now)
    changes: list[str] = []
    refused: dict[str, str] = {}
    never: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        text = f"{key}: {_show(before.get(key))} -> {_show(after.get(key))}"
        rule = resume_rule(type(config), key)
        if isinstance(rule, Never):
            never.append(f"{text} ({rule.because})")
            continue
        if isinstance(rule, Unless) and rule.forbids(now):
            text, rule = f"{text} (with {rule.other} {rule.because})", False
        section, _, name = key.rpartition(".")
        if name in _FIXED.get(section, ()):
            rule = False
        if rule or any(fnmatch.fnmatchcase(key, pattern) for pattern in config.checkpoint.allow_changes):
            changes.append(text)
        else:
            refused[key] = text
    if never or refused:
        said = "; ".join([*never, *refused.values()])
        allow = "" if never else f"allow them with checkpoint.allow_changes=[{', '.join(refused)}], "
        raise ValueError(
            f"checkpoint.resume: {path} was written by a run that computed something else: {said}. Set them back, "
            f"{allow}or start anew with checkpoint.resume=never"
        )
    return changes


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; lists are values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
