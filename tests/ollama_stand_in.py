"""A stand-in for an Ollama server: it checks the digest of every blob and the order of calls, and makes no model.

What it proves is that we speak the protocol as documented; that a real server accepts our models it does not prove.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class OllamaStandIn:
    """What the server has seen, and how it shall answer."""

    calls: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    created: dict[str, Any] | None = None
    models: set[str] = field(default_factory=set)
    create_lines: list[dict[str, str]] = field(
        default_factory=lambda: [{"status": "parsing"}, {"status": "writing manifest"}, {"status": "success"}]
    )
    create_status: int = 200
    url: str = ""


@contextmanager
def ollama_stand_in() -> Iterator[OllamaStandIn]:
    seen = OllamaStandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.calls.append(f"GET {self.path}")
            self.reply(200, b"Ollama is running")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/api/blobs/"):
                self.take_blob(self.path.removeprefix("/api/blobs/"), body)
            else:
                self.create(json.loads(body))

        def do_DELETE(self) -> None:
            seen.calls.append(f"DELETE {self.path}")
            model = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
            known = model in seen.models
            seen.models.discard(model)
            self.reply(200 if known else 404, b"" if known else b'{"error": "model not found"}')

        def take_blob(self, digest: str, body: bytes) -> None:
            seen.calls.append("POST blob")
            if digest != "sha256:" + hashlib.sha256(body).hexdigest():
                self.reply(400, b"digest mismatch")
                return
            known = digest in seen.blobs
            seen.blobs[digest] = body
            self.reply(200 if known else 201, b"")

        def create(self, body: dict[str, Any]) -> None:
            seen.calls.append(f"POST {self.path}")
            missing = [name for name, digest in body["files"].items() if digest not in seen.blobs]
            if missing or seen.create_status != 200:
                self.reply(seen.create_status if not missing else 400, f"missing {missing}".encode())
                return
            seen.created = body
            if seen.create_lines[-1].get("status") == "success":
                seen.models.add(body["model"])
            self.reply(200, b"".join(json.dumps(line).encode() + b"\n" for line in seen.create_lines))

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
