"""A model hub on a real socket: the two routes that a download needs, and the faults that a network has."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "4e0f" * 10
LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """What the hub has and does. `cut`: path → bytes after which a connection breaks, once for each entry."""

    files: dict[str, bytes]
    repository: str = "org/tiny"
    token: str | None = None
    port: int = 0
    cut: list[tuple[str, int]] = field(default_factory=list)
    failures: int = 0
    wrong: set[str] = field(default_factory=set)
    ignores_range: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    tokens_at_cdn: list[str | None] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content)}
            entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            if path.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            siblings.append(entry)
        return {"sha": COMMIT, "siblings": siblings}

    def read(self, path: str) -> list[str | None]:
        """Return the `Range` of each request for a file."""
        return [wanted for asked, wanted in self.requests if asked == path]


@contextmanager
def hub(files: dict[str, bytes], **options: Any) -> Iterator[Hub]:
    """Run a hub."""
    state = Hub(files, **options)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return None

        def do_GET(self) -> None:
            address = unquote(urlsplit(self.path).path)
            known = state.token is None or self.headers.get("Authorization") == f"Bearer {state.token}"
            if not known and not address.startswith("/cdn/"):
                self.send_error(401)
            elif state.failures:
                state.failures -= 1
                self.send_error(503)
            elif address == f"/api/models/{state.repository}/revision/main":
                self.answer(json.dumps(state.listing()).encode())
            elif address.startswith(prefix := f"/{state.repository}/resolve/{COMMIT}/"):
                self.file(address.removeprefix(prefix))
            elif address.startswith("/cdn/"):
                state.tokens_at_cdn.append(self.headers.get("Authorization"))
                self.content(address.removeprefix("/cdn/"))
            else:
                self.send_error(404)

        def file(self, path: str) -> None:
            if path not in state.files:
                self.send_error(404)
            elif path.endswith(LARGE):  # as a hub does: large files come from another host
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{state.port}/cdn/{path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.content(path)

        def content(self, path: str) -> None:
            content, wanted = state.files[path], self.headers.get("Range")
            state.requests.append((path, wanted))
            if path in state.wrong:
                state.wrong.discard(path)
                content = bytes(len(content))
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not state.ignores_range else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = next((end for name, end in state.cut if name == path), None)
            if end is not None:
                state.cut.remove((path, end))
                self.close_connection = True
            self.wfile.write(content[start:end])

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
