"""A reward for outputs that are JSON of a given schema."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from nemo_brain.rewards.verifiers.base import Verifier
from nemo_brain.rewards.verifiers.extract import last_block


class JSONSchemaReward(Verifier):
    """1 for an output that is one JSON value valid by the schema, 0 for another.

    Args:
        schema: a JSON file; null: each prompt has its own.
        field: without ``schema``: where in a prompt's record it stands, as an object.
        fenced: the value is looked for in the output's last Markdown fence (```json, or without a label).

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy; jsonschema is not installed.
    """

    def __init__(self, schema: str | None = None, field: str = "schema", fenced: bool = False):
        if importlib.util.find_spec("jsonschema") is None:
            raise ValueError("JSONSchemaReward needs jsonschema: pip install 'nemo_brain[verifiers]'")
        if type(fenced) is not bool:
            raise ValueError(f"reward.fenced must be true or false, not {fenced!r}")
        self._validator: Any = None
        self._field = field
        self._fenced = fenced
        if schema is None:
            return
        try:
            self._validator = _validator(json.loads(Path(schema).expanduser().read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"reward.schema={schema}: {error} (name a file with a JSON schema)") from error

    def check(self, reference: str | None, metadata: dict) -> None:
        if self._validator is not None:
            return
        if self._field not in metadata:
            raise ValueError(
                f"no schema (write one into the record's {self._field!r}, name another field with reward.field, or "
                "one schema for all prompts with reward.schema)"
            )
        try:
            _validator(metadata[self._field])
        except ValueError as error:
            raise ValueError(f"{self._field!r}: {error} (correct the record)") from error

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        return [float(self._valid(output, record)) for output, record in zip(outputs, metadata, strict=True)]

    def _valid(self, output: str, record: dict) -> bool:
        text = last_block(output, ("json",)) if self._fenced else output
        try:
            value = json.loads(text or "", parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        validator = self._validator or _validator(record[self._field])
        try:
            return validator.is_valid(value)
        except RecursionError:  # nested deeper than Python's stack
            return False


def _validator(schema: Any) -> Any:
    """ValueError: it is no JSON schema."""
    import jsonschema
    from referencing.jsonschema import EMPTY_REGISTRY

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}") from error
    # What is given looks nothing up elsewhere: a reference to another document is an error, no request.
    return kind(schema, registry=EMPTY_REGISTRY)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
