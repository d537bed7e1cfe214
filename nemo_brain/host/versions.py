"""Which versions of the host are known to work, and which are known not to."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping

from packaging.version import Version

# The whole test suite runs with these: nemo_toolkit 2.7.3, megatron-core 0.15.3 and lightning 2.4.0.
_WORKING = {"nemo_toolkit": "2.7", "megatron-core": "0.15", "lightning": "2.4"}
_BROKEN = {
    ("nemo_toolkit", "3.0"): "it has no Megatron models any more (nemo.collections.llm)",
    ("megatron-core", "0.14"): "it has no ProcessGroupCollection, which NeMo 2.7 imports",
    ("megatron-core", "0.16"): "it has dropped no_weight_decay_cond, which NeMo 2.7 gives to get_megatron_optimizer",
}


def installed() -> dict[str, str | None]:
    """The host's versions by package; None: it is not installed as one."""
    found: dict[str, str | None] = {}
    for package in _WORKING:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def check(versions: Mapping[str, str | None]) -> None:
    """Warns of versions that nobody has tried, by name.

    Raises:
        ImportError: a version is known not to work.
    """
    for package, version in versions.items():
        working = _WORKING[package]
        remedy = f"install {package}=={working}.*"
        if version is None:
            warnings.warn(f"{package} is not installed as a package, its version is unknown: {remedy}", stacklevel=2)
            continue
        parsed = Version(version)
        series = f"{parsed.major}.{parsed.minor}"
        if series == working:
            continue
        if (package, series) in _BROKEN:
            raise ImportError(f"{package} {version} does not work: {_BROKEN[package, series]}; {remedy}")
        warnings.warn(
            f"{package} {version} has not been tried with nemo_brain, {working} has: if something fails, {remedy}",
            stacklevel=2,
        )
