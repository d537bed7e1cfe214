"""Whose errors they are."""

from __future__ import annotations

import traceback


def is_ours(error: BaseException) -> bool:
    """Whether this package has raised it: such a ValueError names the key or the line and the remedy, and needs no
    traceback. Those of libraries keep theirs."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return last[0].f_globals["__name__"].startswith("nemo_brain.")
