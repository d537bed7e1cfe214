"""Overrides of parallel layouts, and the metrics that are times."""

from __future__ import annotations

TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VIRTUAL = "model.virtual_pipeline_model_parallel_size=2"
SP = "model.sequence_parallel=true"
TIMINGS = ("_seconds", "tokens_per_second", "peak_memory_gib")
