"""Counts what a card would be given to launch: torch's operations that compute something, and Triton's kernels."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "_unsafe_view")


class Launches(TorchDispatchMode):
    """``found``: how many of each operation. Views and memory are none; a Triton kernel that is interpreted is one, and
    so is a call of ``one``'s."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()
        self._counting = False

    def __enter__(self) -> Launches:
        launch = GridExecutor.__call__

        def counted(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            self.one(executor.fn.__name__, lambda: launch(executor, *args, **kwargs))()

        GridExecutor.__call__ = counted
        self._patches.callback(setattr, GridExecutor, "__call__", launch)
        super().__enter__()
        self._counting = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._counting = False
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.").split(".")[0]
        returns = function._schema.returns
        view = returns and all(item.alias_info is not None and not item.alias_info.is_write for item in returns)
        if not view and name not in _MEMORY:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def one(self, name: str, function: Callable) -> Callable:
        """The function, counted as one launch whatever it does: it stands for a kernel."""

        def kernel(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += self._counting
            with _disable_current_modes():
                return function(*args, **kwargs)

        return kernel
