"""Which host Python imports, and whether its versions are known to work: ``python -m nemo_brain.host.versions``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import runpy
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

_MODULES = {"nemo_toolkit": "nemo", "megatron-core": "megatron.core", "lightning": "lightning"}
# What was run with each: docs/host.md. Of several the first is the one to install.
_WORKING = {"nemo_toolkit": ("2.7",), "megatron-core": ("0.15", "0.16"), "lightning": ("2.4",)}
_BROKEN = {
    ("nemo_toolkit", ">=3"): "it has no Megatron models any more (nemo.collections.llm)",
    ("megatron-core", "<0.15"): "it has no ProcessGroupCollection, which NeMo 2.7 imports",
    ("megatron-core", ">=0.17"): "it has dropped inference_wrapper_config, which NeMo 2.7 imports",
}


@dataclass(frozen=True)
class Package:
    """A package of the host.

    ``file``: what Python imports of it; None: nothing. ``version``: of these files, without what stands behind a "+".
    ``installed``: the version that the installer knows, which other files may shadow.
    """

    name: str
    file: str | None
    version: str | None
    installed: str | None

    @property
    def broken(self) -> str | None:
        """Why it cannot work, and the remedy."""
        if self.file is None:
            return f"{self.name} is not installed: {self._remedy}"
        for (name, versions), reason in _BROKEN.items():
            if self.name == name and self.version and _within(self.version, versions):
                return f"{self.name} {self.version} ({self.file}) does not work: {reason}; {self._remedy}"
        return None

    @property
    def shadowed(self) -> str | None:
        """That Python imports other files than the installed ones, and the remedy."""
        if self.installed is None or self.installed == self.version:
            return None
        return (
            f"Python imports {self.name} {self.version} from {self.file}, but {self.installed} is installed: take what "
            "stands before it off PYTHONPATH, or uninstall one of the two"
        )

    @property
    def untried(self) -> str | None:
        """That nobody has run it with nemo_brain, and the remedy."""
        series = _WORKING[self.name]
        if self.version and any(_within(self.version, f"=={tried}.*") for tried in series):
            return None
        return (
            f"{self.name} {self.version} has not been tried with nemo_brain, {' and '.join(series)} has: if something "
            f"fails, {self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        return f"install {self.name}=={_WORKING[self.name][0]}.*"


def installed() -> list[Package]:
    """The host as Python would import it from where it is started; nothing of it is imported."""
    return [_find(name, module) for name, module in _MODULES.items()]


def check(packages: Iterable[Package]) -> None:
    """Warns of versions that are not the installed ones, or have not been tried.

    Raises:
        ImportError: a version is known not to work.
    """
    for package in packages:
        if package.broken:
            raise ImportError(package.broken)
        if doubt := package.shadowed or package.untried:
            warnings.warn(doubt, stacklevel=2)


def unlike(packages: Iterable[Package], wanted: Sequence[Requirement]) -> list[str]:
    """What is said of the host's packages that are not as ``wanted``."""
    versions = {package.name: package.version for package in packages}
    return [
        f"{requirement} is wanted, Python imports {requirement.name} {versions.get(requirement.name)}"
        for requirement in wanted
        if not _within(versions.get(requirement.name) or "0", str(requirement.specifier))
    ]


def _within(version: str, versions: str) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)


def _find(name: str, module: str) -> Package:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package around it
        spec = None
    try:
        known = Version(importlib.metadata.version(name)).public
    except importlib.metadata.PackageNotFoundError:
        known = None
    if spec is None or spec.origin is None:
        return Package(name, None, None, known)
    stated = Path(spec.origin).with_name("package_info.py")  # NeMo's and Megatron's, which import nothing
    version = Version(runpy.run_path(str(stated))["__version__"]).public if stated.exists() else known
    return Package(name, spec.origin, version, known)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the host that Python imports; fails where it cannot work.")
    parser.add_argument("wanted", nargs="*", type=Requirement, help="versions that it must have: megatron-core==0.16.*")
    wanted = parser.parse_args().wanted
    packages = installed()
    for package in packages:
        print(f"{package.name} {package.version} {package.file}", f"({package.untried})" if package.untried else "")
    faults = [fault for package in packages if (fault := package.broken or package.shadowed)]
    if faults := faults + unlike(packages, wanted):
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
