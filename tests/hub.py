"""A hub of one model, as much of it as huggingface_hub's downloads use."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as a download uses, over one directory."""

    files: Path
    asked: list[str]
    breaks_off: bool = False
    """Whether the connection ends in the middle of what a client reads of a file's beginning."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/org/tiny/tree/"):
            self._answer(json.dumps(self._tree()).encode(), body)
        elif path.startswith("/api/models/org/tiny"):
            self._answer(json.dumps(self._listing()).encode(), body)
        elif path.startswith(("/org/tiny/resolve/main/", f"/org/tiny/resolve/{COMMIT}/")):
            file = self.files / path.rpartition("/")[2]
            self._answer(file.read_bytes() if file.is_file() else None, body, error="EntryNotFound")
        else:
            self._answer(None, body, error="RepoNotFound")

    def _listing(self) -> dict:
        names = [{"rfilename": file.name} for file in sorted(self.files.iterdir())]
        return {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "private": False, "siblings": names, "tags": []}

    def _tree(self) -> list[dict]:
        files = sorted(self.files.iterdir())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]

    def _answer(self, content: bytes | None, body: bool, error: str = "") -> None:
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = 0, len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(content)}-{abs(hash(content))}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self.wfile.write(content[start : (start + end) // 2 if wanted and self.breaks_off else end])

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving_hub(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The hub has a directory's files as `org/tiny` inside the block."""
    handler = type("Served", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint, raising=False)
    yield handler
    server.shutdown()
    server.server_close()
