"""Objectives by name or import path, with their options checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hydra.utils import get_object, instantiate

from nemo_brain.objectives.base import Objective

OBJECTIVES: dict[str, type[Objective]] = {}
Item = TypeVar("Item", bound=Callable)


def register(name: str, registry: dict = OBJECTIVES) -> Callable[[Item], Item]:
    """Registers an objective class under ``name``, or with ``registry=GOODNESS`` a goodness model."""

    def add(item: Item) -> Item:
        if name in registry:
            raise ValueError(f"{name!r} is already registered")
        registry[name] = item
        return item

    return add


def make_objective(name: str | None = None, *, _target_: str | None = None, **options: Any) -> Objective:
    """The objective registered as ``name``, or of the subclass of ``Objective`` whose import path is ``_target_``.

    Args:
        options: its constructor's arguments; those of a ``_target_`` may have a ``_target_`` of their own, for Hydra to
            make. One that is None counts as left out.

    Raises:
        ValueError: as ``complete_options``; and a value out of range.
    """
    section = complete_options({"name": name, "_target_": _target_, **options})
    registered = section.pop("name", None)
    if registered is not None:
        return OBJECTIVES[registered](**section)
    try:
        return instantiate(section, _convert_="all")
    except Exception as error:  # Hydra wraps what the target raises
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"objective._target_={_target_} cannot be made: {cause}") from error


def complete_options(section: Mapping[str, Any]) -> dict[str, Any]:
    """An ``objective`` section without its nulls and with the defaults of the options that it leaves out.

    Raises:
        ValueError: both or neither of ``name`` and ``_target_``; a name that is unknown, a target that is no
            ``Objective``; an option that the objective lacks, or one it needs and was not given. The message lists what
            is known.
    """
    given = {key: value for key, value in section.items() if value is not None}
    kind = objective_class(given)
    what = f"objective {given['name']!r}" if "name" in given else f"objective._target_={given['_target_']}"
    parameters = inspect.signature(kind).parameters
    known = f"options of {what}: {', '.join(parameters) or 'none'}"
    unknown = sorted(given.keys() - parameters.keys() - {"name", "_target_"})
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise ValueError(f"unknown option objective.{unknown[0]}; {known}. One that is inherited is set to null")
    for option, parameter in parameters.items():
        if option in given or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty:
            raise ValueError(f"objective.{option} is required; {known}")
        if isinstance(parameter.default, (bool, int, float, str)):
            given[option] = parameter.default
    return given


def objective_class(section: Mapping[str, Any]) -> type[Objective]:
    """The class that an ``objective`` section names. ValueError as ``complete_options``."""
    name, target = section.get("name"), section.get("_target_")
    known = ", ".join(sorted(OBJECTIVES))
    if name is not None and target is not None:
        raise ValueError(f"objective.name={name} and objective._target_={target} are two objectives: set one to null")
    if name is None and target is None:
        raise ValueError(f"set objective.name to one of {known}, or objective._target_ to a class of your own")
    if target is None:
        if name not in tuple(OBJECTIVES):
            raise ValueError(
                f"unknown objective.name {name!r}; known: {known}. A class of your own: objective.name=null and "
                "objective._target_=its import path"
            )
        return OBJECTIVES[name]
    try:
        kind = get_object(target)
    except Exception as error:  # what the module raises, too
        cause = " ".join(str(error).split())
        raise ValueError(f"objective._target_={target} cannot be imported: {cause}") from error
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ValueError(f"objective._target_={target} is no subclass of nemo_brain.objectives.Objective")
    return kind
