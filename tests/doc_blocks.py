"""The code blocks of README.md, CONTRIBUTING.md and docs/, and the commands in those that are for a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toy_runs import ROOT

LANGUAGES = {"bash", "python", "json", "yaml", "bibtex", "text"}
_FENCE = re.compile(r" *```")
_NOT_RUN = re.compile(r" *<!-- not run: (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """``place`` is its file and line; ``not_run`` says why it is only shown, as ``<!-- not run: ... -->`` before it."""

    place: str
    language: str
    text: str
    not_run: str | None


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: a block is indented instead of fenced, or has no language that is known here.
    """
    place, lines = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page, page.read_text().splitlines()
    opened, listed = None, False
    for index, line in enumerate(lines):
        if opened is None:
            inside = listed and (not line or line.startswith(" "))
            listed = inside or bool(re.match(r" *(-|\d+\.) ", line))
            if line.startswith("    ") and not lines[index - 1] and not listed:
                raise ValueError(f"{place}:{index + 1}: an indented block: fence it, and name its language")
        if not _FENCE.match(line):
            continue
        if opened is None:
            opened, language = index, line.strip().removeprefix("```")
            if language not in LANGUAGES:
                raise ValueError(f"{place}:{index + 1}: a block of {language!r}, none of {sorted(LANGUAGES)}")
            continue
        margin = len(lines[opened]) - len(lines[opened].lstrip())
        text = "".join(inner[margin:] + "\n" for inner in lines[opened + 1 : index])
        marked = _NOT_RUN.fullmatch(lines[opened - 1])
        yield Block(f"{place}:{opened + 1}", language, text, marked and marked["reason"])
        opened = None


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a simple script, without comments, variables before it, and ``...``."""
    for line in script.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words
