"""``nemo-brain convert from=SOURCE to=DIRECTORY``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    try:
        from nemo_brain.host import cpu

        cpu.enable()

        from nemo_brain.convert.command import main as convert

        convert(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: nothing is written", file=sys.stderr)
        sys.exit(130)
