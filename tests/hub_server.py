"""As much of the Hugging Face hub as huggingface_hub's client asks for to push a model, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import reset_sessions

TOKEN = "hf_made_up_for_tests"


class Hub(ThreadingHTTPServer):
    """A hub with one token. ``refused``: paths that are answered with a status, by their ends."""

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """The client, and processes that are started, ask this hub, with its token."""
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_ENDPOINT", self.url)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setenv("HF_TOKEN", TOKEN)
        reset_sessions()  # of a test before, which may have been offline


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, body: object, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        for end, status in hub.refused.items():
            if path.endswith(end):
                return self._answer({"error": "refused"}, status)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            hub.private |= {name} if asked.get("private") and not known else set()
            return self._answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if path.endswith("/preupload/main"):
            modes = [(file["path"], file["path"].endswith(".safetensors")) for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} for p, lfs in modes]
            return self._answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/objects/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repositories[repository][value["path"]] = hub.objects[value["oid"]]
            return self._answer({"commitUrl": f"{hub.url}/{repository}/commit/1", "commitOid": "1" * 40})
        return self._answer({"error": f"no {path} here"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_GET(self) -> None:
        repository = "/".join(self.path.removeprefix("/api/models/").partition("?")[0].split("/")[:2])
        if repository in self.server.repositories:
            return self._answer({"id": repository, "siblings": [], "sha": "1" * 40, "xetEnabled": False})
        return self._answer({"error": "not found"}, 404)

    def log_message(self, *_) -> None:
        pass
