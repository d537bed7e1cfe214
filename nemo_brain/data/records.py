"""Records of JSONL files or of Python iterables, each with the place that an error about it names."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from hydra.utils import instantiate

from nemo_brain.core.packages import PREFIX, package_file

Source = str | os.PathLike | Iterable
# Levels of lists and objects in a record: what writes, copies or compares one later goes a few calls deep for each.
_LEVELS = 64
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


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

    def with_prompt(self, prompt: str | list[dict], own: Collection[str]) -> Record:
        """A prompt file's record at the same place, without the keys ``own``; the prompt is text or messages."""
        fields = {name: value for name, value in self.fields.items() if name not in own}
        return replace(self, fields={**fields, "prompt" if isinstance(prompt, str) else "messages": prompt})

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


def made_source(source: Any, key: str) -> Any:
    """A source as it is, or what the callable returns that a ``_target_`` names. ValueError: it failed."""
    if not isinstance(source, Mapping):
        return source
    try:
        return instantiate(source, _convert_="all")
    except Exception as error:  # Hydra wraps what the target raises
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{key}: _target_={source.get('_target_')} failed: {cause}") from error


def read_records(source: Source, key: str) -> Iterator[Record]:
    """Streams records from a JSONL file, a list of files, or an iterable of mappings. Blank lines are skipped.

    Raises:
        ValueError: a file cannot be read or is empty, a line is not a JSON object in UTF-8, an item is not a mapping.
    """
    for part in parts(source, key):
        if isinstance(part, Record):
            yield part
        else:
            with open_lines(part, key) as file:
                for _, number, line in lines_of(file, part, key):
                    yield parse_line(part, number, line)


def parts(source: Source, key: str) -> Iterator[Path | Record]:
    """The files that a source names, and the records that it holds itself, in their order. ValueError: it has none."""
    items = [source] if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(items, Iterable) or isinstance(items, Mapping):
        raise ValueError(f"{key} is {kind(source)} (give a JSONL file, a list of them, or an iterable of records)")
    empty = True
    for index, item in enumerate(items):
        empty = False
        if isinstance(item, (str, os.PathLike)):
            yield _located(item, key)
        elif isinstance(item, Mapping):
            yield _checked(Record(f"{key}[{index}]", key, f"{key}:{index}", dict(item)))
        else:
            raise ValueError(f"{key}[{index}] is {kind(item)}, not a record (give mappings or paths of JSONL files)")
    if empty:
        raise ValueError(f"{key} is empty (give at least one record)")


def _located(path: str | os.PathLike, key: str) -> Path:
    """The path, or the file of an installed package that it names. ValueError: there is none."""
    if not str(path).startswith(PREFIX):
        return Path(path)
    try:
        return package_file(str(path))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def open_lines(path: Path, key: str) -> BinaryIO:
    """The file, decompressed if its name ends in .gz. ValueError: it cannot be opened."""
    try:
        return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = getattr(error, "strerror", None) or error
        raise ValueError(f"{key}: cannot read {path}: {problem} (give the path of a JSONL file)") from error


def lines_of(file: IO[bytes], path: Path, key: str, longest: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """The lines that are not blank: where each begins, its number from 1, and its bytes.

    Args:
        longest: the bytes that a line may have, so that a file without line breaks is not read as a whole.

    Raises:
        ValueError: a line is longer, the file cannot be decompressed, or all of it is blank.
    """
    offset, number, empty = 0, 0, True
    while line := next_line(file, path, key, -1 if longest is None else longest + 1):
        number += 1
        if longest is not None and len(line) > longest:
            raise ValueError(
                f"{path}:{number}: a line of more than {longest} bytes (write one JSON object per line, and shorten it)"
            )
        if line.strip():
            empty = False
            yield offset, number, line
        offset += len(line)
    if empty:
        raise ValueError(f"{key}: {path} is empty (write one JSON object per line)")


def next_line(file: IO[bytes], path: Path, key: str, size: int = -1) -> bytes:
    """The next line, or ``size`` bytes of it; empty at the end. ValueError: it cannot be read."""
    try:
        return file.readline(size)
    except (EOFError, OSError, zlib.error) as error:
        remedy = "compress it again, or name it without .gz" if path.suffix == ".gz" else "check its disk"
        raise ValueError(f"{key}: cannot read {path}: {error} ({remedy})") from error


def parse_line(path: Path, number: int, line: bytes) -> Record:
    """The record of one line. ValueError: it is not a JSON object in UTF-8, or one that cannot be written out again."""
    record = Record(f"{path}:{number}", str(path), f"{path.stem}:{number}", {})
    if line.startswith(codecs.BOM_UTF8):
        raise record.error("a byte order mark", "save the file as UTF-8 without one")
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
    record.fields = fields
    return _checked(record, brackets=line.count(b"[") + line.count(b"{"))


def _checked(record: Record, brackets: int | None = None) -> Record:
    """The record, which must be what a run can write out again: Python's parser also takes NaN and half characters.

    Args:
        brackets: a bound on the levels of lists and objects, where one is known.
    """
    if (brackets is None or brackets > _LEVELS) and _deeper(record.fields, _LEVELS):
        raise record.error(f"lists and objects within each other, more than {_LEVELS} levels", "flatten the record")
    try:
        _ENCODER.encode(record.fields).encode()
    except UnicodeEncodeError as error:
        raise record.error("text with half of a surrogate pair", "write the character as UTF-8") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise record.error(
            f"a value that JSON cannot hold: {error}",
            "use text, finite numbers (no NaN, no Infinity), lists and objects",
        ) from error
    return record


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie within each other in more levels."""
    if isinstance(value, (dict, list, tuple)):
        inner = value.values() if isinstance(value, dict) else value
        return levels == 0 or any(_deeper(item, levels - 1) for item in inner)
    return False


def kind(value: object) -> str:
    """What a value is, in the words of a JSON file."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
