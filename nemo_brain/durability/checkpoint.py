"""Checkpoints on disk: complete or invisible, checked when they are read, the newest and the best kept.

A checkpoint is a directory ``step_000000042`` that holds

- ``weights/``: model, optimizer and scheduler in Megatron's distributed format (torch_dist), as NeMo writes it;
- ``run.json``: its step and score, the run's configuration, the start model's fingerprint and package versions;
- ``state.json``: where the run stood, with the groups that it was working on; ``random/``: each rank's random states;
- ``manifest.json``: size and CRC-32 of every file.

It is written as ``.step_....incomplete`` and renamed when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from nemo_brain.host.checkpoint_index import read_index

FORMAT = 2
_MANIFEST = "manifest.json"
_READ_BYTES = 2**24


def name_of(step: int) -> str:
    return f"step_{step:09d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def complete(directory: Path) -> list[Path]:
    """The checkpoints in ``directory``, the newest first."""
    found = [path for path in directory.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted((path for path in found if (path / _MANIFEST).is_file()), key=step_of, reverse=True)


def find(path: Path) -> list[Path]:
    """The checkpoint ``path``, or those in a directory of them or in a run's, the newest first; [] if there is none."""
    if (path / _MANIFEST).is_file():
        return [path]
    return complete(path) or complete(path / "checkpoints")


def begin(directory: Path, step: int) -> Path:
    """An empty place to write a checkpoint to; what interrupted writes have left is removed. For rank 0."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".*"):
        if leftover.name.startswith(".step_"):
            shutil.rmtree(leftover, ignore_errors=True)
    path = directory / f".{name_of(step)}.incomplete"
    path.mkdir()
    return path


def publish(path: Path, checksums: dict[str, list[int]]) -> Path:
    """Makes what lies in ``path`` (see ``begin``) a checkpoint. For rank 0, when every rank has written its files."""
    write_text(path / _MANIFEST, json.dumps({"format": FORMAT, "files": checksums}))
    for folder in {path, *(file.parent for file in files_of(path))}:
        _sync(folder)
    final = path.with_name(path.name.removeprefix(".").removesuffix(".incomplete"))
    shutil.rmtree(final, ignore_errors=True)  # the same step, written by a run that was resumed from an earlier one
    path.rename(final)
    _sync(path.parent)
    return final


def files_of(path: Path) -> list[Path]:
    """Every file below ``path`` but the manifest, in one order for all ranks."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != _MANIFEST)


def checksums(path: Path, rank: int, ranks: int) -> dict[str, list[int]]:
    """Size and CRC-32 of this rank's share of the files."""
    return {str(file.relative_to(path)): _checksum(file) for file in files_of(path)[rank::ranks]}


def damage(path: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None.

    Rank 0 also looks at what the index and the common part of the weights would run when they are read.
    """
    try:
        manifest = read_json(path / _MANIFEST)
        if manifest["format"] > FORMAT:
            return f"{path}: its format {manifest['format']} is newer than this version's {FORMAT}: update nemo_brain"
        if manifest["format"] < FORMAT:
            return f"{path}: its format {manifest['format']} is an earlier version's, which this one does not read"
        expected = sorted(manifest["files"].items())
        if rank == 0:
            read_index(path / "weights")
            # Megatron leaves it to torch's default, which the environment can change, whether this is data alone.
            load_data(path / "weights" / "common.pt")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: cannot be read: {error}"
    for name, (size, crc) in expected[rank::ranks]:
        file = path / name
        if not file.is_file():
            return f"{path}: {name} is missing"
        if file.stat().st_size != size:
            return f"{path}: {name} has {file.stat().st_size} bytes, {size} were written"
        if _checksum(file)[1] != crc:
            return f"{path}: {name} is not what was written (checksum)"
    return None


def prune(directory: Path, keep_last: int, keep_best: int) -> None:
    """Removes all but the newest ``keep_last`` checkpoints and the ``keep_best`` of the highest score. For rank 0."""
    found = complete(directory)
    scores = {path: score for path in found if (score := score_of(path)) is not None}
    kept = {*found[:keep_last], *sorted(scores, key=lambda path: (-scores[path], -step_of(path)))[:keep_best]}
    for path in found:
        if path not in kept:
            # Out of sight first: half of a removed checkpoint is none.
            hidden = path.with_name(f".{path.name}.removed")
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def score_of(path: Path) -> float | None:
    """The held-out score of exactly the checkpoint's model; None: it was not evaluated, or is no longer there."""
    try:
        return read_json(path / "run.json")["score"]
    except FileNotFoundError:  # the thread that writes in the background has just removed it
        return None


def write_text(path: Path, content: str) -> None:
    """Writes and syncs a file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_data(path: Path) -> Any:
    """What torch.save wrote, if that is data alone; ValueError otherwise: nothing in it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or not data alone: {str(error).splitlines()[0]}") from None


def _checksum(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as opened:
        while data := opened.read(_READ_BYTES):
            size += len(data)
            crc = zlib.crc32(data, crc)
    return [size, crc]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
