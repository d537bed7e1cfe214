"""An OpenAI-compatible server for tests: its judge prefers the answer with more letters a."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

from listener import Listener


class JudgeServer:
    """``fault(attempt, body)`` returns what to answer instead: a status, or text in place of JSON; None: nothing."""

    def __init__(
        self, fault: Callable[[int, dict], int | str | None] = lambda attempt, body: None, key: str | None = None
    ):
        self.fault, self.key = fault, key
        self.requests: list[dict] = []
        self.verdict = by_letters
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append(body)
                    attempt = len(owner.requests)
                status, text = 200, json.dumps(owner.answer(body))
                if owner.key is not None and self.headers.get("Authorization") != f"Bearer {owner.key}":
                    status, text = 401, "no"
                elif (wrong := owner.fault(attempt, body)) is not None:
                    status, text = (wrong, "wrong") if isinstance(wrong, int) else (200, wrong)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        server = Listener(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, body: dict) -> dict:
        (message,) = body["messages"]
        text = f"I think so.\n{self.verdict(message['content'])}"
        usage = {"prompt_tokens": len(message["content"].split()), "completion_tokens": 4}
        return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def by_letters(question: str) -> str:
    first, second = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nExplain", question, re.S).groups()
    a, b = first.count("a"), second.count("a")
    return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"
