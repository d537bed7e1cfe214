"""Which checkpoint a run goes on from, and whether its configuration lets it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_brain.config.brain import Config
from nemo_brain.durability import checkpoint
from nemo_brain.report.run_dir import read_status

# Keys that change how a run computes and where, never what: by pattern.
_FREE = (
    "run_dir",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.max_iterations",
    "trainer.val_every_iterations",
    "trainer.hang_timeout_minutes",
    "trainer.log_every_steps",
    "trainer.stop_after_minutes",
    "model.export_to",
    "model.export_adapter_to",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.recompute",
    "model.options*",
    "prior.placement",
    "rollout.rows_in_flight",
    "rollout.save",
    "rollout.remote*",
    "train.micro_batch_tokens",
    "train.layout",
    "train.on_nonfinite",
    "train.min_ess",
    "train.max_kl",
    "ddp*",
    "checkpoint*",
    "logger*",
)


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


def check_configuration(config: Config, path: Path, now: Mapping[str, Any]) -> list[str]:
    """Compares a checkpoint's configuration with the run's.

    Returns:
        The keys that differ, described.

    Raises:
        ValueError: a key differs that changes the mathematics and is not among ``checkpoint.allow_changes``.
    """
    try:
        before = flatten(checkpoint.read_json(path / "run.json")["configuration"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint.resume: {path}/run.json cannot be read: {error}") from error
    after = flatten(now)
    changes, refused = [], []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        text = f"{key}: {_show(before.get(key))} -> {_show(after.get(key))}"
        free = any(fnmatch.fnmatchcase(key, pattern) for pattern in (*_FREE, *config.checkpoint.allow_changes))
        (changes if free else refused).append(text)
    if refused:
        keys = ", ".join(text.partition(":")[0] for text in refused)
        raise ValueError(
            f"checkpoint.resume: {path} was written by a run that computed something else: {'; '.join(refused)}. Set "
            f"them back, allow them with checkpoint.allow_changes=[{keys}], or start anew with checkpoint.resume=never"
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
