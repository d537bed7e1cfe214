"""Overrides of parallel layouts, metrics that are times, and cases that other versions of the host have to pass too."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VIRTUAL = "model.virtual_pipeline_model_parallel_size=2"
SP = "model.sequence_parallel=true"
TIMINGS = ("_seconds", "tokens_per_second", "peak_memory_gib")


def cases(names: Iterable[str], *compatibility: str) -> list:
    """Parameters of a test, those named again with the marker."""
    return [pytest.param(name, marks=[pytest.mark.compatibility] * (name in compatibility)) for name in names]
