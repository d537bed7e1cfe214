"""A reward that is a Python function, named by a dotted path or by a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

KEY = "reward.function"


class FunctionReward:
    """Calls a function with the signature of ``Reward``, other arguments bound.

    Args:
        function: ``package.module.name`` or ``path/to/file.py:name``.
        kwargs: keyword arguments that every call passes on.

    Raises:
        ValueError: there is no such function, it cannot be imported, or it does not take these arguments.
    """

    # A function is local to its process: a failed batch may be called again in parts.
    rescorable = True

    def __init__(self, function: str, **kwargs: object) -> None:
        self.name = function
        self._function = load_function(function)
        self._kwargs = kwargs
        try:
            inspect.signature(self._function).bind([], [], references=[], metadata=[], **kwargs)
        except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
            raise ValueError(
                f"{KEY}={function} cannot be called: {error} (define it as (prompts, outputs, *, references, metadata) "
                f"and the other keys of the reward section: {', '.join(kwargs) or 'none'})"
            ) from error

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> Sequence[float]:
        return self._function(prompts, outputs, references=references, metadata=metadata, **self._kwargs)


def load_function(path: str) -> Callable:
    """The function at ``package.module.name`` or ``file.py:name``.

    Raises:
        ValueError: the path is malformed, there is no such module, file or name, it cannot be imported or called.
    """
    in_file = isinstance(path, str) and ".py:" in path
    place, _, name = path.rpartition(":" if in_file else ".") if isinstance(path, str) else ("", "", "")
    if not place or not name:
        raise ValueError(f"{KEY}={path!r} names no function (write package.module.name or path/to/file.py:name)")
    module = _file_module(place) if in_file else _module(place)
    if not hasattr(module, name):
        raise ValueError(f"{KEY}={path}: {place} has no {name!r} (define it there, or correct the name)")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{KEY}={path} is a {type(function).__name__}, not callable (name a function)")
    return function


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _import_failed(name, error) from error
        raise ValueError(
            f"{KEY}: there is no module {error.name!r} (install it, put its directory on PYTHONPATH, or write "
            "path/to/file.py:name)"
        ) from error
    except Exception as error:
        raise _import_failed(name, error) from error


def _file_module(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{KEY}: there is no file {file} (relative paths start at the working directory)")
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(path, error) from error
    return module


def _import_failed(place: str, error: Exception) -> ValueError:
    return ValueError(f"{KEY}: importing {place} failed with {type(error).__name__}: {error} (correct it there)")
