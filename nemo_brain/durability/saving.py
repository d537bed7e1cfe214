"""Writes a run's checkpoints when they are due, and reads the one that a run goes on from. All ranks together."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_brain.config.common import CheckpointConfig
from nemo_brain.core.ranks import gathered, in_thread, on_all_ranks
from nemo_brain.durability import checkpoint
from nemo_brain.host.checkpointing import InProcessSave
from nemo_brain.model.parameters import VOCABULARY_TENSORS, global_parameters, is_adapter, unwrap

_PACKAGES = ("nemo_brain", "nemo_toolkit", "megatron-core", "torch", "transformers")

Result = TypeVar("Result")


class Saves(Protocol):
    """What a strategy offers for its weights to be saved; see ``training.strategy``."""

    fingerprint: str
    saver: InProcessSave

    def save_weights(self, path: Path) -> None: ...


class Checkpointer:
    """Saves a run's state.

    With ``config.in_background`` the state is copied to host memory, and a thread of each rank writes it while training
    goes on; the threads talk over a gloo group of their own.

    Args:
        config: when, how, and how many are kept.
        directory: the run's ``checkpoints``.
        record: what every checkpoint says of the run besides: its kind and its resolved configuration.
    """

    def __init__(self, config: CheckpointConfig, directory: Path, record: Mapping[str, Any]):
        self.config = config
        self.directory = directory
        self.record = record
        self._saved_at = time.monotonic()
        self._group: dist.ProcessGroup | None = None  # None: of all ranks
        self._writing: Future | None = None

    def due(self, step: int) -> bool:
        """Whether this rank finds that a checkpoint is to be written after this step: clocks differ between ranks."""
        if self.config.every_steps is not None and step % self.config.every_steps == 0:
            return True
        minutes = self.config.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def best(self, score: float | None) -> bool:
        """Whether a checkpoint with this score would be one of ``keep_best``. For rank 0."""
        if score is None or not self.config.keep_best:
            return False
        found = map(checkpoint.score_of, checkpoint.complete(self.directory))
        better = sum(other is not None and other >= score for other in found)
        return better < self.config.keep_best

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written in the background: ``finish`` raises then."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, strategy: Saves, step: int, score: float | None, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint, or begins to. A collective of all ranks.

        Args:
            step: optimizer steps so far.
            score: of exactly this model, for ``keep_best``; None: it was not evaluated.
            state: where the run stands, in JSON values; that of rank 0 is taken.

        Raises:
            OSError: on every rank, when one of them could not write this checkpoint, or the one before it; earlier
                checkpoints are unharmed.
        """
        self.finish()
        first = dist.get_rank() == 0
        path = self.directory / f".{checkpoint.name_of(step)}.incomplete"
        _written(lambda: checkpoint.begin(self.directory, step) if first else None)
        # A collective by itself: where it fails on one rank the others wait inside of it, and the supervisor ends them.
        _unharmed(lambda: strategy.save_weights(path))
        files = {}
        if first:
            run = {
                **self.record,
                "step": step,
                "score": score,
                "start_model": strategy.fingerprint,
                "versions": versions(),
                "layout": layout(),
            }
            files = {"run.json": json.dumps(run), "state.json": json.dumps(state)}
        write = functools.partial(self._write, strategy.saver, path, _random_states(), files)
        if self.config.in_background:
            self._group = self._group or dist.new_group(backend="gloo")
            self._writing = in_thread(write, "checkpoint")
        else:
            write()
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Waits until the checkpoint that is being written in the background is complete. OSError as in ``save``."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, saver: InProcessSave, path: Path, random_states: dict, files: Mapping[str, str]) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()

        def write() -> None:
            saver.write(self._group)
            (path / "random").mkdir(exist_ok=True)
            torch.save(random_states, path / "random" / f"{rank:05d}.pt")
            for name, content in files.items():
                checkpoint.write_text(path / name, content)

        _written(write, self._group)
        checksums = _written(lambda: checkpoint.checksums(path, rank, ranks), self._group)
        shares = gathered(checksums, self._group)

        def publish() -> None:
            if rank == 0:
                checkpoint.publish(path, {name: entry for share in shares for name, entry in share.items()})
                checkpoint.prune(self.directory, self.config.keep_last, self.config.keep_best)

        _written(publish, self._group)


def _written(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """``on_all_ranks``, with an OSError that says what it means."""
    return on_all_ranks(lambda: _unharmed(work), group)


def _unharmed(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except OSError as error:
        said = f"the checkpoint could not be written, earlier ones are unharmed: rank {dist.get_rank()}: {error}"
        raise OSError(said) from error


def first_intact(candidates: Sequence[Path]) -> Path:
    """The first checkpoint of which every file is as it was written. A collective of all ranks.

    Raises:
        ValueError: on every rank, when there is none.
    """
    problems = []
    for path in candidates:
        shares = gathered(checkpoint.damage(path, dist.get_rank(), dist.get_world_size()))
        found = [problem for problem in shares if problem is not None]
        if not found:
            return path
        problems.append(found[0])
        if dist.get_rank() == 0:
            warnings.warn(f"checkpoint left out: {found[0]}", stacklevel=2)
    raise ValueError(
        f"checkpoint.resume: no intact checkpoint: {'; '.join(problems)} (start anew with checkpoint.resume=never, or "
        "name another one)"
    )


def restore_random_states(path: Path) -> None:
    """This rank's random states, where the checkpoint was written in the same layout; otherwise they stay fresh.

    Nothing that a run computes depends on them (draws are keyed), but a reward may.

    Raises:
        ValueError: the file is damaged, or would run code.
    """
    file = path / "random" / f"{dist.get_rank():05d}.pt"
    if checkpoint.read_json(path / "run.json")["layout"] != layout() or not file.is_file():
        return
    states = checkpoint.load_data(file)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def _random_states() -> dict:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": (version, torch.tensor(internal), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def layout() -> dict[str, int]:
    return {
        "ranks": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = None
    return found


@torch.no_grad()
def fingerprint(chunks: Sequence[torch.nn.Module], vocab_size: int) -> str:
    """A hash of a model's weights, bit for bit, that does not depend on the layout, nor on adapters beside them. A
    collective of one replica.

    Of each tensor the bits are added up as integers, and their squares, modulo 2^64: sums over any shards.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    mine: dict[str, tuple[int, int, bool]] = {}
    for chunk in chunks:
        for parameter in global_parameters(unwrap(chunk)):
            if is_adapter(parameter.name):
                continue
            weight = parameter.parameter.detach()
            if parameter.name in VOCABULARY_TENSORS:
                rows = weight.shape[0]
                weight = weight[: max(0, min(rows, vocab_size - tensor_rank * rows))]
            kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[weight.element_size()]
            bits = weight.contiguous().view(kind).long()
            # Counted once: by the first rank where all hold the same, by each where they hold parts.
            counts = parameter.partition_dim is not None or tensor_rank == 0
            mine[parameter.name] = (int(bits.sum()), int((bits * bits).sum()), counts)
    group = parallel_state.get_model_parallel_group()
    shares: list = [None] * group.size()
    dist.all_gather_object(shares, (tensor_rank, mine), group=group)
    sums: dict[str, list[int]] = {}
    seen = set()
    for rank, share in shares:
        for name, (first, second, counts) in share.items():
            if counts and (rank, name) not in seen:  # the last stage's copy of a tied embedding is left out
                seen.add((rank, name))
                total = sums.setdefault(name, [0, 0])
                total[0], total[1] = (total[0] + first) % 2**64, (total[1] + second) % 2**64
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()
