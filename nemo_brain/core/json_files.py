"""JSON files that others have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError: there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error} (copy it again)") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object (copy it again)")
    return content
