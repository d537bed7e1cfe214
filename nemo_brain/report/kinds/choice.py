"""Which kind of training a run is, by what it has recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_brain.report.charts import Records
from nemo_brain.report.kinds.base import Report
from nemo_brain.report.kinds.brain import BRAInReport
from nemo_brain.report.kinds.evaluation import EvaluationReport
from nemo_brain.report.kinds.reward_model import RewardModelReport
from nemo_brain.report.kinds.sft import SFTReport

# Fields of step or eval records that no other kind has.
_TELLING = {
    "iteration": BRAInReport,
    "candidate": EvaluationReport,
    "completion_tokens": SFTReport,
    "eval/perplexity": SFTReport,
    "reward_gap": RewardModelReport,
    "eval/log_loss": RewardModelReport,
}


def make_report(records: Records, samples: Records, config: Mapping[str, Any]) -> Report:
    """What there is to report of a run with these files; of no kind as long as no record tells."""
    kinds = (kind for record in records for name, kind in _TELLING.items() if name in record)
    return next(kinds, Report)(records, samples, config)
