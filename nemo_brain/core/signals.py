"""Signals that ask this process to end: Ctrl-C (SIGINT), SIGTERM (shutdown, ``scancel``, preemption) and SIGUSR1
(``sbatch --signal=USR1@120``).

Nothing is imported that takes long, so that a script can listen before it imports what does. Python runs a signal's
handler in the main thread, which may wait for minutes in a collective or a kernel: a thread hears it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

# sysexits.h's EX_TEMPFAIL: try again later. Whoever requeues jobs tests for it.
EXIT_CODE = 75
_AT_ONCE = 128 + signal.SIGINT  # as shells have it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal sends Ctrl-C to all processes in the foreground, and launchers among them send it to theirs once more.
_SAME_SECONDS = 2.0


def _leave(number: signal.Signals) -> NoReturn:
    _end(EXIT_CODE, f"stopped: signal {number.name} before the training began: nothing is lost")


_receiver: Callable[[signal.Signals], None] = _leave
_pressed: float | None = None  # when the first Ctrl-C was
_hearing = False
_ending = threading.RLock()


def listen(receiver: Callable[[signal.Signals], None] = _leave) -> None:
    """From now on ``receiver`` is called at each of the signals, in any thread, more than once. For the main thread.

    By default the process ends, with ``EXIT_CODE``: it has nothing to save yet. Whatever the receiver does, the process
    ends at once at a second Ctrl-C; torchrun passes that on as SIGTERM.
    """
    global _receiver, _pressed, _hearing
    _receiver, _pressed = receiver, None
    for number in _SIGNALS:
        signal.signal(number, _handle)
    if not _hearing:
        _hearing = True
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
        threading.Thread(target=_hear, args=(ear,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=_forget)


def _handle(number: int, frame: Any) -> None:
    _receiver(signal.Signals(number))


def _hear(ear: socket.socket) -> NoReturn:
    global _pressed
    while True:
        (number,) = ear.recv(1)
        if number not in _SIGNALS or signal.getsignal(number) is not _handle:
            continue  # somebody else's
        _receiver(signal.Signals(number))
        if _pressed is not None and number != signal.SIGUSR1 and time.monotonic() - _pressed > _SAME_SECONDS:
            _end(_AT_ONCE, "ended at once by a second Ctrl-C: what came after the last checkpoint is lost")
        if _pressed is None and number == signal.SIGINT:
            _pressed = time.monotonic()
            _say("Ctrl-C: saving, then ending. A second Ctrl-C ends at once")


def _forget() -> None:
    """In a process that this one forks: it has its own signals, and Ctrl-C is its parent's to deal with."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"\n{text}\n".encode())  # the line before may be a progress bar


def _end(code: int, text: str) -> NoReturn:
    with _ending:  # the main thread and the one that hears, once
        _say(text)
        os._exit(code)
