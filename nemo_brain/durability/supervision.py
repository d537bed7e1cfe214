"""Ends every rank when one of them cannot go on: the first failure ends them all, and so does a standstill.

A thread on each rank looks once a second into a store that all of them share, so a rank learns of it whatever its main
thread waits in: a collective of NCCL or gloo, the pipeline, a file system.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

import lightning.pytorch as pl
import torch.distributed as dist

from nemo_brain.core.heartbeat import heartbeats
from nemo_brain.core.interruption import Interrupted, Interruption

_POLL_SECONDS = 1.0
# Ranks end so much later than the one that failed: launchers take the first that ends for the cause.
_GRACE_SECONDS = 3.0
_LAST_SECONDS = 30.0  # so long the rank that failed may take to end, and ranks whose store has gone with rank 0
_VERDICT, _HEARD, _PROGRESS, _INTERRUPTED = "verdict", "heard", "progress", "interrupted"


class Supervisor(pl.Callback):
    """Watches over a trainer's ranks, from the moment on at which they have met.

    - An exception on one rank ends all of them within seconds, with its traceback as the last thing that they print:
      in full on the first rank of each node, in one line on the others.
    - Where no rank has had a ``heartbeat`` for ``hang_minutes``, every rank prints its threads' stacks, writes them to
      ``directory``/stacks/rank_00000.txt, and ends.

    - Where one rank is asked to end, all of them learn of it: each may be waiting for something that the others know
      nothing of.

    Exit codes are 1. What all ranks raise alike, such as a user's mistake, and ``Interrupted`` end them by themselves.
    """

    def __init__(self, hang_minutes: float, directory: Path, interruption: Interruption):
        self._hang_minutes = hang_minutes
        self._directory = directory
        self._interruption = interruption
        self._watch: _Watch | None = None  # until the ranks have met

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._watch = _Watch(self._hang_minutes, self._directory, self._interruption)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if self._watch is None:
            return
        if isinstance(exception, Interrupted):
            self._watch.stop()
        else:
            self._watch.report(exception)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """After a run that nothing happened to; the store is not to end before all ranks have got here."""
        assert self._watch is not None, "the ranks have not met"
        dist.barrier()
        self._watch.stop()


class _Watch:
    """One rank's thread and its end of the store; made on all ranks together."""

    def __init__(self, hang_minutes: float, directory: Path, interruption: Interruption):
        self._hang_minutes = hang_minutes
        self._directory = directory
        self._interruption = interruption
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store = _shared_store(self._rank)
        self._done = threading.Event()
        self._ending = threading.Event()  # the thread ends this process, for a reason that another rank has given
        self._heard, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._guarded, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watches no longer: this rank ends by itself."""
        self._done.set()

    def report(self, exception: BaseException) -> None:
        """Tells all ranks what this one has raised. Returns where it ends by itself."""
        error = f"{type(exception).__name__}: {exception}"
        text = "".join(traceback.format_exception(exception))
        try:
            verdict = self._judge({"kind": "failure", "rank": self._rank, "error": error, "text": text})
            if verdict["kind"] == "hang":  # of which this is a consequence: the thread ends this process
                self._thread.join()
            elif verdict["rank"] == self._rank:
                if self._rank == 0:
                    self._await_hearing(_GRACE_SECONDS, self._size - 1)  # the store ends with this rank
            elif verdict["error"] == error:  # as on all ranks: this one ends by itself
                self._done.set()
                self._hear()
            else:  # a consequence: the thread ends this process
                self._thread.join()
        except RuntimeError:  # rank 0 has gone, and the store with it
            if self._ending.is_set() and not self._done.is_set():  # as it had said that it would
                self._thread.join()

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:  # nothing else would end this rank
            self._end(f"its supervisor has failed: {type(error).__name__}: {error}")

    def _run(self) -> None:
        counted, total, since = heartbeats(), None, time.monotonic()
        while not self._done.wait(_POLL_SECONDS):
            count = heartbeats()
            try:
                everyones = self._store.add(_PROGRESS, int(count != counted))
                if everyones != total:
                    total, since = everyones, time.monotonic()
                elif time.monotonic() - since > 60 * self._hang_minutes:
                    self._judge({"kind": "hang", "rank": self._rank, "error": ""})
                self._share_interruption()
                verdict = json.loads(self._store.get(_VERDICT)) if self._store.check([_VERDICT]) else None
            except RuntimeError:
                if not self._done.wait(_LAST_SECONDS):
                    self._end("rank 0 has gone: what it says is the cause")
                return
            counted = count
            if verdict is not None:
                self._obey(verdict)
                return

    def _share_interruption(self) -> None:
        if (reason := self._interruption.requested) is not None:
            self._store.set(_INTERRUPTED, reason)
        elif self._store.check([_INTERRUPTED]):
            self._interruption.request(self._store.get(_INTERRUPTED).decode())

    def _judge(self, verdict: dict) -> dict:
        """Says what ends the run; returns what does: the first that any rank has said."""
        return json.loads(self._store.compare_set(_VERDICT, "", json.dumps(verdict)))

    def _obey(self, verdict: dict) -> None:
        """Ends this process, in the supervisor's thread."""
        if verdict["kind"] == "failure" and verdict["rank"] == self._rank:
            time.sleep(_LAST_SECONDS)  # the main thread raises, and need not be waited for longer than this
            self._end("this rank has failed, and does not end by itself")
        self._ending.set()
        if verdict["kind"] == "hang":
            self._show_stacks()
        with contextlib.suppress(RuntimeError):
            self._hear()
        if verdict["kind"] == "hang":
            self._await_hearing(_LAST_SECONDS, self._size)
            self._end(
                f"no rank has got any further for {self._hang_minutes:g} minutes (trainer.hang_timeout_minutes). All "
                f"ranks' stacks are above, and in {self._directory / 'stacks'}"
            )
        if self._done.wait(_GRACE_SECONDS):
            return
        first = f"rank {verdict['rank']} has failed, which ends this one: "
        whole = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self._end(first + (f"\n{verdict['text'].rstrip()}" if whole else verdict["error"]))

    def _hear(self) -> None:
        """Says that this rank knows how the run ends, once."""
        with self._lock:
            if not self._heard:
                self._heard = True
                self._store.add(_HEARD, 1)

    def _await_hearing(self, seconds: float, count: int) -> None:
        """Until so many ranks know how the run ends."""
        ended = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while self._store.add(_HEARD, 0) < count and time.monotonic() < ended:
                time.sleep(0.1)

    def _show_stacks(self) -> None:
        path = self._directory / "stacks" / f"rank_{self._rank:05d}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
            self._print(f"stacks:\n{path.read_text()}")
            return
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)  # no place to write to

    def _print(self, text: str) -> None:
        print(f"[rank {self._rank}] {text}", file=sys.stderr, flush=True)

    def _end(self, text: str) -> NoReturn:
        try:
            self._print(text)
        finally:  # also where nobody reads what is printed
            os._exit(1)


def _shared_store(rank: int) -> dist.TCPStore:
    """A store of this run's own on rank 0's machine: others outlive a restart, or are waited in by the main thread."""
    address: list = [None]
    if rank == 0:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        address = [(host, store.port)]
    dist.broadcast_object_list(address, src=0)
    host, port = address[0]
    return store if rank == 0 else dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
