"""A hub of our own on loopback: one repository of files, with sizes and hashes, byte ranges, and faults on request."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@dataclass
class Hub:
    """What the server gives and what it was asked for."""

    repository: str
    files: dict[str, bytes]
    cut: dict[str, int] = field(default_factory=dict)  # path -> bytes after which every connection breaks
    damaged: set[str] = field(default_factory=set)  # paths whose bytes are not those of the hash
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range) of every GET of a file
    address: str = ""

    @classmethod
    def of_folders(cls, repository: str, **folders: Path) -> "Hub":
        files = {}
        for name, folder in folders.items():
            for path in filter(Path.is_file, folder.rglob("*")):
                files[f"{name}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
        return cls(repository, files)

    def listing(self) -> dict:
        rows = []
        for path, data in self.files.items():
            row = {"rfilename": path, "size": len(data)}
            row["blobId"] = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            if not path.endswith(".json"):
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            rows.append(row)
        return {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": rows, "tags": []}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.address` until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            place = self.path.partition("?")[0]
            if place.startswith(f"/api/models/{hub.repository}"):
                revision = place.partition("/revision/")[2]
                if revision in ("", "main"):
                    return self._send(json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"}, body)
                return self._send(b"{}", {"X-Error-Code": "RevisionNotFound"}, body, 404)
            path = place.removeprefix(f"/{hub.repository}/resolve/{COMMIT}/")
            if path not in hub.files:
                return self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, body, 404)
            data = hub.files[path]
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if not body:
                return self._send(data, headers, body)
            span = self.headers.get("Range")
            hub.asked.append((path, span))
            start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
            if path in hub.damaged:
                data = bytes(len(data))
            if span:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if path in hub.cut:
                end = max(start, hub.cut[path])
                return self._send(data[start:end], headers, body, 206 if span else 200, length=len(data) - start)
            return self._send(data[start:], headers, body, 206 if span else 200)

        def _send(self, data: bytes, headers: dict, body: bool, code: int = 200, length: int | None = None) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            if body:
                self.wfile.write(data)
            if length is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
