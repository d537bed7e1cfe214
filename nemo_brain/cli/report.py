"""``nemo-brain report RUN_DIR``: writes the report of a run, or of several one page that compares them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nemo_brain.report.page import write_overlay, write_report


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="nemo-brain report",
        description="Writes RUN_DIR/report.html; of several runs one page that compares them.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    parser.usage = "nemo-brain report RUN_DIR [RUN_DIR ... out=PAGE.html]"
    given = parser.parse_args(arguments).run_dirs
    outs = [word.removeprefix("out=") for word in given if word.startswith("out=")]
    run_dirs = [word for word in given if not word.startswith("out=")]
    if not run_dirs or len(outs) != (len(run_dirs) > 1):
        parser.error("one RUN_DIR alone, or several and out=PAGE.html")
    try:
        print(write_overlay(run_dirs, outs[0]) if outs else write_report(run_dirs[0]))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
