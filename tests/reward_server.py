"""A reward server for tests: it scores an output by its length, and does wrong what it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from listener import Listener


class RewardServer:
    """Serves on a free port of this machine while its context lasts.

    key: requests without it are answered 401.
    fault: called with the number of the attempt at a request (told apart by its outputs) and its items; returns what to
        do wrong, or None. ``drop``, ``hang``, a status, bytes or another body to send.
    """

    def __init__(self, key: str = "", fault: Callable = lambda attempt, items: None):
        self.key, self.fault = key, fault
        self.requests: list[list[dict]] = []
        self.most = 0  # requests at a time
        self.seconds = 0.0  # that each takes
        self._attempts: dict[str, int] = {}
        self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> RewardServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the acknowledgement of its headers

            def do_POST(self):
                outer.post(self)

            def log_message(self, *args):
                pass

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()
        self.http.server_close()

    def post(self, handler) -> None:
        items = json.loads(handler.rfile.read(int(handler.headers["content-length"])))["items"]
        if handler.path != "/score":
            _send(handler, 404, {"error": {"message": "Not Found", "item": None}})
            return
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            _send(handler, 401, {"error": {"message": f"not {handler.headers.get('authorization')}", "item": None}})
            return
        name = json.dumps(items)
        with self._lock:
            self.requests.append(items)
            attempt = self._attempts[name] = self._attempts.get(name, 0) + 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.seconds)
            self._answer(handler, items, self.fault(attempt, items))
        finally:
            with self._lock:
                self._now -= 1

    def _answer(self, handler, items: list[dict], fault) -> None:
        if fault == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif fault == "half":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif fault == "hang":
            time.sleep(3)
            handler.close_connection = True
        elif isinstance(fault, int):
            # As a careless server or proxy may do, it repeats what it was sent.
            echoed = {"error": {"message": f"fault with {handler.headers.get('authorization')}", "item": None}}
            _send(handler, fault, echoed, {"Retry-After": "0"} if fault == 429 else {})
        elif isinstance(fault, tuple):
            _send(handler, *fault)
        elif fault is not None:
            _send(handler, 200, fault)
        else:
            _send(handler, 200, {"rewards": [float(len(item["output"])) for item in items]})


def _send(handler, status: int, answer, headers: dict | None = None) -> None:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    lines = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
    for name, value in lines.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
