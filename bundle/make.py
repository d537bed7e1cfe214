"""Packs the project, and of what it imports that which an image with torch lacks, into one archive: make bundle.

The archive needs no network where it is unpacked, and installs nothing: its packages lie in a folder of their own that
``activate`` puts before the image's. Their versions are those of constraints-cpu.txt.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bundle.check import pins

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60e6  # bytes of the archive
PROJECT = [
    "nemo_brain",
    "conf",
    "examples",
    "benchmarks",
    "tests",
    "bundle",
    "docs",
    "Makefile",
    "pyproject.toml",
    "setup.py",
    "constraints-cpu.txt",
    "README.md",
    "LICENSE",
]
# Newest first: glibc 2.28 is what images of the last years have.
PLATFORMS = [
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
    "manylinux2010",
    "manylinux1",
]
SOURCES = ("antlr4-python3-runtime", "wget")  # no wheels are published
# The solvers of PuLP, which modelopt imports and nothing here calls; the largest tests; what Python compiles again.
LEFT_OUT = ("pulp/solverdir/cbc", "onnx/backend/test", "site/tests/", "__pycache__")
ACTIVATE = """# . FOLDER/activate: Python finds nemo_brain and what came with it first, then what is installed.
here=$(cd "$(dirname "${BASH_SOURCE:-$0}")" && pwd)
export PYTHONPATH="$here/site:$here${PYTHONPATH:+:$PYTHONPATH}"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="where it is to run (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=ROOT / "build", help="folder of the archive (default: %(default)s)")
    options = parser.parse_args()
    name = f"nemo_brain-py{options.python.replace('.', '')}-linux-x86_64"
    options.to.mkdir(parents=True, exist_ok=True)
    archive = options.to / f"{name}.tar.xz"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, name)
        install(folder / "site", options.python, Path(scratch, "wheels"))
        copy_project(ROOT, folder)
        (folder / "activate").write_text(ACTIVATE, encoding="utf-8")
        (folder / "bundle" / "python.txt").write_text(options.python + "\n", encoding="utf-8")
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(folder, name, filter=lambda member: None if left_out(member.name) else member)
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(
            f"it should have at most {LIMIT / 1e6:.0f} MB: look for what has grown, or add it to bundle/expected.txt"
        )


def copy_project(source: Path, target: Path) -> None:
    """Without what lies beside the project's own files: environments, caches."""
    for part in PROJECT:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        else:
            shutil.copy(source / part, target / part)


def requirements() -> list[str]:
    """bundle/packages.txt with constraints-cpu.txt's versions.

    Raises:
        ValueError: a package has no version there.
    """
    versions = dict(line.split("==") for line in pins(ROOT / "constraints-cpu.txt"))
    found = pins(ROOT / "bundle" / "packages.txt")
    if unknown := [name for name in found if name not in versions]:
        raise ValueError(f"bundle/packages.txt: constraints-cpu.txt has no version of {', '.join(unknown)}")
    return [f"{name}=={versions[name]}" for name in found]


def install(site: Path, python: str, wheels: Path) -> None:
    """Puts the packages' files for that Python into ``site``.

    Those that are published as sources alone are pure Python, and become wheels here.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check"]
    sources = [line for line in requirements() if line.split("==")[0] in SOURCES]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), *sources], check=True)
    # pip takes a platform by its name alone: the older ones too, and what is for any.
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    abis = [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    given = ["--no-deps", "--no-compile", "--only-binary=:all:", f"--python-version={python}", *platforms, *abis]
    command = [*pip, "install", "--target", str(site), "--find-links", str(wheels), *given, *requirements()]
    subprocess.run(command, check=True)


def left_out(path: str) -> bool:
    return any(part in path for part in LEFT_OUT)


if __name__ == "__main__":
    main()
