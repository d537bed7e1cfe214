"""What is missing where a bundle was unpacked, or has another version; python bundle/check.py, in its folder.

Exits with 1 where something is missing. Another version than the one asked for is said, and may work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def pins(file: Path) -> list[str]:
    """A list's lines without comments."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def faults(expected: list[str], built_for: str) -> tuple[list[str], list[str]]:
    """What is missing, and what is of another version, in words."""
    missing, other = [], []
    python = "{}.{}".format(*sys.version_info)
    if python != built_for:
        missing.append(
            f"Python {built_for}, which the bundle was built for: this is {python} (make bundle BUNDLE_PYTHON={python})"
        )
    for line in expected:
        name = re.split(r"[<>=!~]", line, maxsplit=1)[0]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(line)
            continue
        if not _within(version, line):
            other.append(f"{line} is expected, {version} is installed")
    return missing, other


def _within(version: str, line: str) -> bool:
    """Bounds are compared number by number; they are few and plain (bundle/expected.txt)."""
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", line):
        ours, theirs = ([int(part) for part in re.findall(r"\d+", text)] for text in (version.split("+")[0], bound))
        if (ours < theirs) if sign == ">=" else (ours >= theirs):
            return False
    return True


def main() -> int:
    missing, other = faults(pins(HERE / "expected.txt"), (HERE / "python.txt").read_text(encoding="utf-8").strip())
    for line in other:
        print(f"another version: {line}")
    if missing:
        print("missing: " + "; ".join(missing))
        return 1
    import torch

    if torch.cuda.is_available():
        print(f"torch {torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    else:
        print(f"torch {torch.__version__} sees no card: everything runs on the CPU")
    for name in ("transformer_engine", "flash_attn", "apex"):
        found = importlib.util.find_spec(name)
        print(f"{name}: {'installed' if found else 'not installed, which costs speed alone'}")
    print(f"complete; to run:\n  . {HERE.parent}/activate\n  python -m nemo_brain train --config-name toy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
