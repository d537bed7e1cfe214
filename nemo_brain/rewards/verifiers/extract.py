"""Parts of an output that verifiers look for."""

from __future__ import annotations

import re


def last_block(text: str, labels: tuple[str, ...]) -> str | None:
    """The content of the last Markdown fence with one of the labels, or without any; None: there is none, or it is not
    closed."""
    found = None
    for label, content in re.findall(r"^```[ \t]*(\S*)[^\n]*\n(.*?)^```[ \t]*$", text, re.DOTALL | re.MULTILINE):
        if not label or label.lower() in labels:
            found = content
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}`` whose braces are closed; None: there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                return text[start : start + brace.start()].strip()
    return None
