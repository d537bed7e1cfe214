"""The tier of a test: ``gpu`` or ``slow`` where it is marked so, ``ranks`` where it starts processes, else ``unit``."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest

TESTS = Path(__file__).resolve().parent


def tier(item: pytest.Function) -> str:
    for said in ("gpu", "slow"):
        if item.get_closest_marker(said):
            return said
    # The functions of a test's fixtures are nowhere in pytest's public interface.
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    return "ranks" if any(_starts_processes(function, set()) for function in (item.function, *fixtures)) else "unit"


def _starts_processes(thing: object, seen: set[int]) -> bool:
    """Whether a function or a class mentions ``subprocess`` or ``os.fork``, or one of tests/ that does."""
    if thing is subprocess:
        return True
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, type):
        return any(_starts_processes(member, seen) for member in vars(thing).values())
    function = inspect.unwrap(thing) if callable(thing) else None
    if not isinstance(function, FunctionType) or TESTS not in Path(function.__code__.co_filename).parents:
        return False
    names = set(_names(function.__code__))
    used = [function.__globals__[name] for name in names & function.__globals__.keys()]
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    return "fork" in names or any(_starts_processes(other, seen) for other in used + enclosed)


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes in a function and in those that are defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
