"""Triton's kernels compiled for cards, which takes none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def compiled(script: str, cache: Path) -> list[str]:
    """The lines that the script prints, in a process in which kernels are compiled and not interpreted."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
