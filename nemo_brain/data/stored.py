"""Records that stay in their files: of a file of millions of lines, memory holds where each line begins."""

from __future__ import annotations

import itertools
import os
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from nemo_brain.data.records import Record, Source, lines_of, next_line, open_lines, parse_line, parts

# Bytes of a line that is read when it is asked for.
LONGEST_LINE = 2**24


class StoredRecords(Sequence[Record]):
    """The records of a source, all of them checked; a file's are read and parsed again when they are asked for.

    A regular file takes 8 bytes of memory per record, and 8 more while it is checked. The records of compressed files
    and pipes, which have no places to go back to, and of iterables are held in memory.

    Args:
        source: a JSONL file, a list of them, or an iterable of records.
        key: the configuration key that errors name.
        check: called with every record in order; returns its id, or raises ValueError for what is wrong with it.

    Raises:
        ValueError: a record or a file is wrong, or two records have one id.
    """

    def __init__(self, source: Source, key: str, check: Callable[[Record], str]):
        self._parts: list[Sequence[Record]] = []
        hashes = array("q")  # of ids: those of equal hashes are compared at the end
        for part in parts(source, key):
            if isinstance(part, Record):
                last = self._parts[-1] if self._parts else None
                if not isinstance(last, list):
                    last = []
                    self._parts.append(last)
                last.append(part)
                hashes.append(hash(check(part)))
            else:
                hashes.extend(hash(check(record)) for record in self._file(part, key))
        self._ends = list(itertools.accumulate(map(len, self._parts)))
        self._refuse_repeated(np.frombuffer(hashes, dtype=np.int64), check)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # slices are not asked for
        """Raises ValueError, naming the file, where it has changed since it was checked or cannot be read any more."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain.from_iterable(self._parts)

    def _file(self, path: Path, key: str) -> Iterator[Record]:
        """Adds a file to the parts while its records are taken."""
        with open_lines(path, key) as file:
            if path.suffix == ".gz" or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                held: list[Record] = []
                self._parts.append(held)
                for _, number, line in lines_of(file, path, key, LONGEST_LINE):
                    held.append(parse_line(path, number, line))
                    yield held[-1]
            else:
                indexed = _IndexedFile(path, key, file)
                self._parts.append(indexed)
                yield from indexed.read(file)

    def _refuse_repeated(self, hashes: np.ndarray, check: Callable[[Record], str]) -> None:
        ordered = np.sort(hashes)
        if not (ordered[1:] == ordered[:-1]).any():
            return
        order = np.argsort(hashes, kind="stable")
        repeated = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for place in repeated[np.argsort(order[repeated + 1])]:  # by the later record of each pair
            later = self[int(order[place + 1])]
            name = check(later)
            while place >= 0 and hashes[order[place]] == hashes[order[place + 1]]:
                earlier = self[int(order[place])]
                if check(earlier) == name:
                    raise later.error(
                        f"the id {name!r} was used before, at {earlier.where}", "give every prompt an id of its own"
                    )
                place -= 1


class _IndexedFile(Sequence[Record]):
    """The lines of a regular file by the places where they begin."""

    def __init__(self, path: Path, key: str, file: IO[bytes]):
        self._path = path
        self._key = key
        self._stamp = _stamp(file)
        self._offsets = array("Q")
        self._blank = array("Q")  # of each blank line, how many records come before it

    def read(self, file: IO[bytes]) -> Iterator[Record]:
        """All records, from the beginning; fills the index."""
        for offset, number, line in lines_of(file, self._path, self._key, LONGEST_LINE):
            self._blank.extend([len(self._offsets)] * (number - 1 - len(self._offsets) - len(self._blank)))
            self._offsets.append(offset)
            yield parse_line(self._path, number, line)
        self._refuse_change(file)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # slices are not asked for
        with open_lines(self._path, self._key) as file:
            self._refuse_change(file)
            file.seek(self._offsets[index])
            line = next_line(file, self._path, self._key)
        return parse_line(self._path, index + 1 + bisect_right(self._blank, index), line)

    def __iter__(self) -> Iterator[Record]:
        # In one go: opening the file for every record would take most of the time.
        with open_lines(self._path, self._key) as file:
            self._refuse_change(file)
            for _, number, line in lines_of(file, self._path, self._key):
                yield parse_line(self._path, number, line)

    def _refuse_change(self, file: IO[bytes]) -> None:
        if _stamp(file) != self._stamp:
            raise ValueError(
                f"{self._key}: {self._path} has changed since the run began to read it (leave files as they are while "
                "a run uses them, and start it again)"
            )


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
