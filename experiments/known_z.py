"""An objective whose normaliser is known, as the figures on variance want it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from nemo_brain.objectives import Objective, make_objective


def objective_with(section: dict[str, Any], log_z: dict[str, float]) -> Objective:
    """The objective of a section; with ``z: known`` it has these log Z by prompt."""
    if section.get("z") != "known":
        return make_objective(**section)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log_z.json"
        path.write_text(json.dumps(log_z), encoding="utf-8")
        return make_objective(**section, log_z=str(path))
