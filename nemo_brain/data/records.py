"""Records of JSONL files or of Python iterables, each with the place that an error about it names."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

Source = str | os.PathLike | Iterable


@dataclass
class Record:
    """One JSON object. ``where`` is ``path:line`` or ``key[index]``; ``source`` the file or the key alone."""

    where: str
    source: str
    default_id: str
    fields: dict

    def error(self, what: str, remedy: str) -> ValueError:
        """The error to raise about this record."""
        return ValueError(f"{self.where}: {what} ({remedy})")

    def text(self, name: str, value: object) -> str:
        """``value``, which must be text."""
        if not isinstance(value, str):
            raise self.error(f"{name} is {kind(value)}, not a string", f"make {name} a string")
        return value

    def number(self, name: str, value: object) -> float:
        """``value``, which must be a finite number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{name} is {kind(value)}, not a number", f"make {name} a number or leave it out")
        try:
            return float(value)
        except OverflowError as error:
            raise self.error(f"{name} is too large", f"make {name} a finite number or leave it out") from error

    def token_ids(self, name: str, value: object, vocabulary: int) -> list[int]:
        """``value``, which must be a non-empty list of ids below ``vocabulary``."""
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise self.error(f"{name} is not a list of integers", f"write {name} as [1, 2, ...] or leave it out")
        if not value:
            raise self.error(f"{name} is empty", "leave it out, so that the text is tokenised")
        for token in value:
            if not 0 <= token < vocabulary:
                raise self.error(
                    f"{name} holds {token}, outside the tokenizer's vocabulary of {vocabulary}",
                    f"use the model's tokenizer, or leave {name} out so that the text is tokenised",
                )
        return value


def read_records(source: Source, key: str) -> Iterator[Record]:
    """Streams records from a JSONL file, a list of files, or an iterable of mappings. Blank lines are skipped.

    Raises:
        ValueError: a file cannot be read or is empty, a line is not a JSON object in UTF-8, an item is not a mapping.
    """
    items = [source] if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(items, Iterable) or isinstance(items, Mapping):
        raise ValueError(f"{key} is {kind(source)} (give a JSONL file, a list of them, or an iterable of records)")
    empty = True
    for index, item in enumerate(items):
        if isinstance(item, (str, os.PathLike)):
            empty = False
            yield from _read_file(Path(item), key)
        elif isinstance(item, Mapping):
            empty = False
            yield _checked(Record(f"{key}[{index}]", key, f"{key}:{index}", dict(item)))
        else:
            raise ValueError(f"{key}[{index}] is {kind(item)}, not a record (give mappings or paths of JSONL files)")
    if empty:
        raise ValueError(f"{key} is empty (give at least one record)")


def _read_file(path: Path, key: str) -> Iterator[Record]:
    try:
        file = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ValueError(f"{key}: cannot read {path}: {error.strerror} (give the path of a JSONL file)") from error
    with file:
        empty = True
        for number, line in enumerate(_lines(file, path, key), start=1):
            if line.strip():
                empty = False
                record = Record(f"{path}:{number}", str(path), f"{path.stem}:{number}", {})
                record.fields = _parse(record, line)
                yield _checked(record)
    if empty:
        raise ValueError(f"{key}: {path} is empty (write one JSON object per line)")


def _lines(file: IO[bytes], path: Path, key: str) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, OSError, zlib.error) as error:  # gzip's
        raise ValueError(f"{key}: cannot read {path}: {error} (compress it again, or name it without .gz)") from error


def _parse(record: Record, line: bytes) -> dict:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise record.error(f"invalid UTF-8 at byte {error.start}", "save the file as UTF-8") from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise record.error(f"invalid JSON: {error}", "write one JSON object per line") from error
    if not isinstance(fields, dict):
        raise record.error(f"{kind(fields)}, not an object", 'write {"prompt": "..."}')
    return fields


def _checked(record: Record) -> Record:
    """The record, which must be what a run can write out again: Python's parser also takes NaN and half characters."""
    try:
        json.dumps(record.fields, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise record.error("text with half of a surrogate pair", "write the character as UTF-8") from error
    except (TypeError, ValueError) as error:
        raise record.error(
            f"a value that JSON cannot hold: {error}",
            "use text, finite numbers (no NaN, no Infinity), lists and objects",
        ) from error
    return record


def kind(value: object) -> str:
    """What a value is, in the words of a JSON file."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
