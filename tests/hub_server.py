"""A hub on this machine that serves the files of one repository, and may lie about them in many ways."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

COMMIT = "c" * 40


@dataclass
class Lies:
    """What the hub says. A lie that is `late` is told only after so many answers that were true."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: Any = COMMIT  # of the API, and of every file's header
    header: str | None = None  # of the files alone
    etag: str | None = None
    names: tuple[str, ...] = ()  # further files in the list
    longer: int = 0  # bytes that are announced and not sent
    status: int = 200
    page: bytes | None = None  # in place of every answer of the API
    late: int = 0
    heads: int = 0  # asked about files so far
    gets: int = 0  # and for them


def _handler(lies: Lies) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            if self.path.startswith("/api/"):
                names = [*lies.files, *lies.names]
                said = {"id": "org/tiny", "sha": lies.commit, "siblings": [{"rfilename": name} for name in names]}
                if "/tree/" in self.path:
                    said = [{"type": "file", "path": n, "size": len(lies.files.get(n, b"")), "oid": n} for n in names]
                return self.send(lies.page or json.dumps(said).encode(), {})
            lies.heads += self.command == "HEAD"
            lies.gets += self.command == "GET"
            true = lies.late > 0 and lies.heads <= lies.late
            body = lies.files.get(self.path.rpartition("/")[2])
            if body is None:
                self.send_response(404)
                for name, value in {
                    "X-Error-Code": "EntryNotFound",
                    "X-Repo-Commit": COMMIT,
                    "Content-Length": 0,
                }.items():
                    self.send_header(name, str(value))
                return self.end_headers()
            digest = hashlib.sha256(body).hexdigest()
            commit = lies.header or (lies.commit if isinstance(lies.commit, str) else COMMIT)
            self.send(
                body,
                {
                    "ETag": f'"{digest if true or lies.etag is None else lies.etag}"',
                    "X-Repo-Commit": COMMIT if true else commit,
                    "Content-Length": len(body) + lies.longer,
                },
            )

        def send(self, body: bytes, headers: dict[str, Any]):
            self.send_response(lies.status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                self.wfile.flush()
                if lies.longer:
                    self.close_connection = True

    return Handler


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lies]:
    """The hub of the process, for as long as this lasts; what it says can be changed meanwhile."""
    lies = Lies()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(lies))
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield lies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
