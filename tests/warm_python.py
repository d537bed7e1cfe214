"""An interpreter for scripts under test that has imported NeMo already: to start it is to fork the test process.

``WarmPython().python`` is a program that stands where the script's starter expects python. It hands its arguments,
directory, environment, standard streams, network and mounts over to a server, which forks a child for them; it passes
signals on, and ends as the child does. Killed, it takes the child with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

_CLIENT = """#!{python} -S
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
namespaces = [os.open("/proc/self/ns/" + name, os.O_RDONLY) for name in {namespaces!r}]
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2, *namespaces])
server.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
sys.exit(server.recv(1)[0])
"""
_NAMESPACES = ("net", "mnt")
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class WarmPython:
    """A context: while it lasts, ``python`` can be started."""

    def __enter__(self) -> WarmPython:
        self._folder = tempfile.TemporaryDirectory()
        address, self.python = Path(self._folder.name, "socket"), Path(self._folder.name, "python")
        client = _CLIENT.format(python=sys.executable, address=str(address), namespaces=_NAMESPACES)
        self.python.write_text(client)
        self.python.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            sys.stdout.flush()
            sys.stderr.flush()
            self._server = os.fork()
            if self._server == 0:
                gc.freeze()  # as in ranks.py
                _serve(listener)
        return self

    def __exit__(self, *_) -> None:
        os.kill(self._server, signal.SIGKILL)  # its children end with it
        os.waitpid(self._server, 0)
        self._folder.cleanup()


def _serve(listener: socket.socket) -> None:
    """Never returns: a child for every client, signals for the children, exit codes for the clients."""
    clients: dict[int, socket.socket] = {}
    while True:
        for ready in select.select([listener, *clients.values()], [], [], 0.01)[0]:
            if ready is listener:
                client = listener.accept()[0]
                size, streams, _, _ = socket.recv_fds(client, 8, 3 + len(_NAMESPACES))
                request = client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
                child = os.fork()
                if child == 0:
                    _run(streams, *json.loads(request))
                for stream in streams:
                    os.close(stream)
                clients[child] = client
            else:
                child = next(pid for pid, client in clients.items() if client is ready)
                with contextlib.suppress(ConnectionError):
                    os.kill(child, (ready.recv(1) or bytes([signal.SIGKILL]))[0])
        for child in list(clients):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                with clients.pop(child) as client, contextlib.suppress(ConnectionError):
                    client.send(bytes([code if code >= 0 else 128 - code]))


def _run(streams: list[int], arguments: list[str], directory: str, environment: dict[str, str]) -> None:
    """As the interpreter itself does it; never returns."""
    status = 1
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for name, namespace in zip(_NAMESPACES, streams[3:], strict=True):
            if os.fstat(namespace).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino and _LIBC.setns(namespace, 0):
                raise OSError(f"the client's {name} namespace cannot be entered")
        for number, stream in enumerate(streams[:3]):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [argument for argument in arguments if argument != "-u"]
        sys.path[:0] = [str(Path(sys.argv[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif sys.argv[0] == "-":
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
