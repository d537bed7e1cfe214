"""docs/figures.md: its text is written by hand, its tables between markers by ``make figures``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "figures.md"


def with_block(text: str, name: str, block: str) -> str:
    """The page with what stands between a block's markers replaced. ValueError: it has no such block."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{PAGE} has no block {name!r}: add <!-- {name} --> and <!-- end -->")
    return pattern.sub(lambda found: f"{found[1]}\n{block.strip()}\n\n{found[2]}", text, count=1)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(mean: float, half: float, digits: int = 3) -> str:
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
