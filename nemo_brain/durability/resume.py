"""Which checkpoint a run goes on from, and whether its configuration lets it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_brain.config.brain import Config
from nemo_brain.config.common import TrainingConfig
from nemo_brain.config.schema import Unless, resume_rule
from nemo_brain.durability import checkpoint

STATUS = "status.json"


def candidates(config: Config) -> list[Path]:
    """The checkpoints to go on from, the best first; [] for a new run.

    ``auto`` takes those in ``run_dir`` unless the run there has ended; a path is one checkpoint or a directory of them.

    Raises:
        ValueError: ``checkpoint.resume`` names a path without a checkpoint.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return []
    if resume == "auto":
        run_dir = Path(config.run_dir)
        found = checkpoint.complete(run_dir / "checkpoints")
        ended = read_status(run_dir)
        total = config.trainer.max_iterations * config.steps_per_iteration
        return [] if ended.get("state") == "finished" and ended.get("step", 0) >= total else found
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
    changes, refused = [], {}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        text = f"{key}: {_show(before.get(key))} -> {_show(after.get(key))}"
        rule = resume_rule(type(config), key)
        if isinstance(rule, Unless) and rule.forbids(now):
            text, rule = f"{text} (with {rule.other} {rule.because})", False
        if rule or any(fnmatch.fnmatchcase(key, pattern) for pattern in config.checkpoint.allow_changes):
            changes.append(text)
        else:
            refused[key] = text
    if refused:
        raise ValueError(
            f"checkpoint.resume: {path} was written by a run that computed something else: "
            f"{'; '.join(refused.values())}. Set them back, allow them with "
            f"checkpoint.allow_changes=[{', '.join(refused)}], or start anew with checkpoint.resume=never"
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


def write_status(run_dir: Path, state: str, step: int) -> None:
    """``running``, ``interrupted``, ``finished`` or ``failed``: what a requeue script and the next run look at."""
    temporary = run_dir / f".{STATUS}"
    temporary.write_text(json.dumps({"state": state, "step": step}) + "\n", encoding="utf-8")
    temporary.rename(run_dir / STATUS)


def read_status(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
