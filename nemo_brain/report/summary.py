"""The end of a run in lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_brain.report.charts import Records
from nemo_brain.report.kinds.choice import make_report


def summary_lines(records: Records, config: Mapping[str, Any], report: str | Path) -> list[str]:
    """What changed on held-out examples, what it cost, where everything is.

    Args:
        records: the run's metrics, see ``metrics.read_metrics``.
        config: its configuration.
        report: the report's path.
    """
    rows = [*make_report(records, [], config).summary(), ("report", str(report))]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]
