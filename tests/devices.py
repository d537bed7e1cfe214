"""The meta device in a GPU's place: its tensors have no values, so whoever asks for one fails, as do ``.item()``,
``.tolist()``, ``.cpu()``, boolean indexing and ``nonzero``. Noted here: what goes there and waits; and the operations
that are no views, each at least one launch on a card."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def noted_waits() -> Iterator[list[str]]:
    """The operations of this thread by which numbers of the host went to the meta device, and waited for it."""
    found: list[str] = []
    with Constructions(found), Copies(found):
        yield found


class Constructions(TorchFunctionMode):
    """Collects the tensors that are made on the device of numbers of the host, which waits; dispatch never sees it."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        self.found += [name] * (name in ("tensor", "as_tensor", "new_tensor") and out.device.type == "meta")
        return out


class Copies(TorchDispatchMode):
    """Collects the operations that copy from the host to the device and wait for it."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name()
        copied = name.startswith(("aten::_to_copy", "aten::copy_"))
        if copied and args[name.startswith("aten::copy_")].device.type == "cpu" and out.device.type == "meta":
            waits = not (kwargs or {}).get("non_blocking", False) and not (args[2:] and args[2] is True)
            self.found += [name] * waits
        return out


class Operations(TorchDispatchMode):
    """The shapes of what this thread's operations give, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.shapes.append(tuple(out.shape) if isinstance(out, torch.Tensor) else ())
        return out
