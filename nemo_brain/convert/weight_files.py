"""Which safetensors file of a Hugging Face directory holds which tensor: in transformers' order, and compared with the
index."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_brain.core.json_files import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor: ``model.safetensors`` where there is one, otherwise what the index names.

    Warns of an index that stands beside a ``model.safetensors`` and names anything else.

    Raises:
        ValueError: there are none, one is damaged or cut off, or the index and the files disagree; names file and
            tensor.
    """
    single = directory / SINGLE
    if single.is_file():
        files = dict.fromkeys(_tensor_names(single), single)
        _warn_of_index(directory, files)
        return files
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    others = sorted(file.name for file in directory.glob("*.safetensors*"))
    if others:
        raise ValueError(
            f"{directory}: neither {SINGLE} nor {INDEX}, which transformers reads, but {', '.join(others[:3])}. Shards "
            "need their index (copy it too); a variant such as fp16 is saved anew once, by its class of transformers: "
            "from_pretrained(OLD, variant=...).save_pretrained(NEW)"
        )
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickled:
        raise ValueError(
            f"{directory}: only pickled weights ({pickled[0]}), which can run code when they are opened. If you "
            "trust them, convert them once, by their class of transformers: from_pretrained(OLD).save_pretrained(NEW)"
        )
    raise ValueError(f"{directory}: no {SINGLE} and no {INDEX}")


def open_tensors(file: Path) -> safe_open:
    """A safetensors file. ValueError: it is damaged or cut off."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError), file.open("rb") as start:
            if start.read(11) == b"version htt":
                raise ValueError(f"{file} is the pointer of Git LFS, not the weights: run git lfs pull") from None
        raise ValueError(f"{file} is damaged or cut off: {error} (copy it again)") from error


def _indexed_files(directory: Path) -> dict[str, Path]:
    """The files that the index names, which must hold the tensors that it says, and no others."""
    files = _weight_map(directory)
    absent = sorted({file.name for file in files.values() if not file.is_file()})
    if absent:
        raise ValueError(f"{directory}: {INDEX} names files that are not there: {', '.join(absent)}")
    held = {file: _tensor_names(file) for file in sorted(set(files.values()))}
    lacking = [f"{file} lacks {name}" for name, file in files.items() if name not in held[file]]
    strays = [f"{file} also holds {name}" for file, names in held.items() for name in names if files.get(name) != file]
    for wrong, what in ((lacking, "which the index says is there"), (strays, "which the index does not say")):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(
                f"{wrong[0]}, {what}{more}: {INDEX} and the files do not belong together (copy the whole directory "
                "again)"
            )
    return files


def _weight_map(directory: Path) -> dict[str, Path]:
    """What the index says. ValueError: it says nothing, or of files outside the directory."""
    index = read_object(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{directory}: {INDEX} has no weight_map of names and files (copy it again)")
    for name, file in index.items():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"{directory}: {INDEX} has {name} in {file}, outside the directory (copy it again)")
    return {name: directory / file for name, file in index.items()}


def _warn_of_index(directory: Path, files: dict[str, Path]) -> None:
    if not (directory / INDEX).is_file():
        return
    named: Any = None  # of an index that cannot be read
    with contextlib.suppress(ValueError):
        named = _weight_map(directory)
    if named != files:
        warnings.warn(
            f"{directory}: {SINGLE} is read, as transformers does, and {INDEX}, which names other tensors or files, is "
            "not: remove the one that does not belong there",
            stacklevel=4,
        )


def _tensor_names(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())
