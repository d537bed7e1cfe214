"""A chart and a table of each figure, from the runs of the plan. KeyError: one of them is missing."""

from __future__ import annotations

LABELS = {
    "brain": "BRAIn",
    "dpo_sft": "DPO-sft",
    "dpo": "DPO",
    "slic": "SLiC",
    "rloo": "RLOO",
    "gdc++": "GDC++",
}
