"""The keys of a schema and of a file of conf/, and what a user reads of a mistake in one."""

from __future__ import annotations

import dataclasses

import pytest
from toy_runs import toy_config

from nemo_brain.config.brain import Config, check


def schema_keys(kind: type = Config, prefix: str = "") -> set[str]:
    """The dotted keys of the schema; a section of free keys (optim, reward ...) counts as one."""
    keys = set()
    for item in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(item.default_factory)
        keys |= schema_keys(item.default_factory, f"{prefix}{item.name}.") if nested else {prefix + item.name}
    return keys


def file_keys(section: dict, free: set[str], prefix: str = "") -> set[str]:
    keys = set()
    for name, value in section.items():
        key = prefix + name
        keys |= file_keys(value, free, f"{key}.") if isinstance(value, dict) and key not in free else {key}
    return keys


def message(*overrides: str, then=None) -> str:
    """What the user reads: the error of ``check``, or of what comes after it."""
    with pytest.raises(ValueError) as caught:
        config = check(toy_config(*overrides))
        if then is not None:
            then(config)
    return str(caught.value)
