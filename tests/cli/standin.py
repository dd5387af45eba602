"""A scripted HTTP server: for answers that the real service gives only when something is wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the server was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What it says. `cut`: the connection is closed before the promised end."""

    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[Request], Answer]


def document(value: Any, *, status: int = 200) -> Answer:
    """Return a JSON answer."""
    return Answer(status, json.dumps(value).encode())


def problem(status: int, code: str, detail: str, *errors: dict[str, str]) -> Answer:
    """Return a problem document."""
    body = {"status": status, "code": code, "detail": detail, "errors": list(errors)}
    return Answer(status, json.dumps(body).encode(), "application/problem+json")


def stream(*events: tuple[str, str, Any], cut: bool = False) -> Answer:
    """Return server-sent events: id, name, data."""
    text = "".join(f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for number, name, data in events)
    return Answer(200, text.encode(), "text/event-stream", cut=cut)


@contextmanager
def stand_in(script: Script) -> Iterator[tuple[str, list[Request]]]:
    """Run a server that answers by `script`; yield its address and what it was asked."""
    asked: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            asked.append(request)
            answer = script(request)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body) + (1 if answer.cut else 0)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
