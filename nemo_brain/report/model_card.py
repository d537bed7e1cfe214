"""A model card: what a model was trained by, and what came of it, as the README.md of a hub repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_brain.report.charts import Records
from nemo_brain.report.kinds.choice import make_report

METHODS = {
    "brain": "BRAIn (Bayesian Reward-conditioned Amortized Inference)",
    "dpo_sft": "DPO-sft on groups of outputs",
    "sft": "supervised fine-tuning",
    "reward_model": "Bradley-Terry training of a reward model on preferences",
}
# What says how a run was made, and nothing of the machines that it ran on.
SECTIONS = ("seed", "objective", "rollout", "train", "optim", "data", "reward")


def model_card(kind: str, repo: str, records: Records, configuration: Mapping[str, Any]) -> str:
    """Markdown with the hub's front matter.

    Args:
        kind: of training.
        repo: ``organisation/name``.
        records: the run's metrics.
        configuration: its configuration. Of paths only the last part is shown, of addresses nothing.
    """
    start = configuration["model"]["restore_from"]
    begun = f"from `{_last(start)}`" if start else "from random weights"
    results = make_report(records, [], configuration).summary()
    shown = {name: _shown(configuration[name]) for name in SECTIONS if configuration.get(name) is not None}
    return "\n".join(
        [
            "---",
            yaml.safe_dump({"library_name": "transformers", "tags": ["nemo_brain", kind]}).strip(),
            "---",
            f"# {repo.rpartition('/')[2]}",
            "",
            f"Trained by {_method(kind, configuration)} {begun} with nemo_brain.",
            "",
            "## Results",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in results),
            "",
            "## Configuration",
            "",
            "```yaml",
            yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
        ]
    )


def _method(kind: str, configuration: Mapping[str, Any]) -> str:
    objective = configuration.get("objective") or {}
    named = objective.get("name") or objective.get("_target_") or kind
    return METHODS.get(named, f"the objective `{named}`")


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shown(part) for name, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_shown(part) for part in value]
    return _last(value) if isinstance(value, str) else value


def _last(text: str) -> str:
    """Of an absolute path the last part; of an address nothing."""
    return "..." if "://" in text else Path(text).name if text.startswith("/") else text
