"""``nemo-brain report RUN_DIR``: writes the report of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nemo_brain.report.page import write_report


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="nemo-brain report", description="Writes RUN_DIR/report.html.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
