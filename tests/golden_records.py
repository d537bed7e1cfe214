"""The comparison of a run's records with those in tests/golden/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# Differences of log-probs of dozens of nats; proposal_gap is rounding error itself.
ABSOLUTE = {"kl_to_prior": 2e-5, "proposal_gap": 1e-4}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def compare(found: list[dict], expected: list[dict], relative: float) -> None:
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            absolute = next((ABSOLUTE[part] for part in ABSOLUTE if part in name), 1e-6)
            near = pytest.approx(value, rel=relative, abs=absolute) if isinstance(value, float) else value
            assert ours[name] == near, (theirs["kind"], theirs["step"], name)
