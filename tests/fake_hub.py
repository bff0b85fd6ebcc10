"""A server that answers what the library `datasets` asks the hub about one data set, own/shapes, and knows no other."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "own/shapes"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(f"/api/datasets/{NAME}(?:/revision/(.*))?", path):
            if found[1] in (None, "main", COMMIT):
                self._json({"id": NAME, "sha": COMMIT, "siblings": [], "tags": [], "private": False})
            else:
                self._none("RevisionNotFound")
        elif found := re.fullmatch(f"/api/datasets/{NAME}/tree/{COMMIT}/?(.*)", path):
            folder = self.root / found[1]
            inside = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.glob("*")
            listed = [self._entry(entry) for entry in sorted(inside)]
            self._json(listed) if listed else self._none("EntryNotFound")
        elif found := re.fullmatch(f"/datasets/{NAME}/resolve/{COMMIT}/(.*)", path):
            file = self.root / found[1]
            self._bytes(file.read_bytes()) if file.is_file() else self._none("EntryNotFound")
        else:
            self._none("RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _entry(self, path: Path) -> dict[str, Any]:
        told = {"path": path.relative_to(self.root).as_posix(), "oid": hashlib.sha1(bytes(path)).hexdigest()}
        return told | ({"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size})

    def _json(self, value: Any) -> None:
        self._bytes(json.dumps(value).encode())

    def _bytes(self, body: bytes) -> None:
        tag = hashlib.sha1(body).hexdigest()
        self._send(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/json"})

    def _none(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a hub whose one data set has these files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
