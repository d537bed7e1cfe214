"""An interpreter for scripts under test that has imported NeMo already: to start it is to fork the test process."""

from __future__ import annotations

import json
import os
import runpy
import select
import socket
import stat
import subprocess
import sys
import traceback
from pathlib import Path

# Stands where the script expects python: passes on its arguments, directory, environment and standard streams.
_CLIENT = """#!{python} -S
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
sys.exit(server.recv(1)[0])
"""


def run_script(command: list, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs a script in whose environment PYTHON is such an interpreter; output and errors are one stream.

    Args:
        folder: an existing one, for the interpreter.
    """
    address, python, log = folder / "socket", folder / "python", folder / "log"
    python.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with socket.socket(socket.AF_UNIX) as server, log.open("w+") as output:
        server.bind(str(address))
        server.listen()
        process = subprocess.Popen(
            command, env={**os.environ, **env, "PYTHON": str(python)}, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if select.select([server], [], [], 0.05)[0]:
                _serve(server.accept()[0])
        output.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, output.read())


def _serve(client: socket.socket) -> None:
    """Runs one program in a fork, to its end."""
    with client:
        size, streams, _, _ = socket.recv_fds(client, 8, 3)
        length, request = int.from_bytes(size, "big"), b""
        while len(request) < length:
            request += client.recv(length - len(request))
        pid = os.fork()
        if pid == 0:
            _child(streams, *json.loads(request))
        for stream in streams:
            os.close(stream)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client.send(bytes([status if status >= 0 else 128 - status]))


def _child(streams: list[int], arguments: list[str], directory: str, environment: dict[str, str]) -> None:
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (the process's own)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = arguments
        if arguments[0] == "-":
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter itself reports it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
