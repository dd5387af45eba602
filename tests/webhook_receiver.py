"""A receiver of webhooks, as a process of its own: appends what it gets to a file and answers as the path says.

`python receiver.py FILE` prints its port. `/ok` 200, `/fail` 500, `/later` 503 with `Retry-After`, `/gone` 410,
`/away` a redirect to `/ok`, `/slow` never, `/once/N` 500 for the first N requests, then 200.
"""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Receiver:
    """The process and what it wrote down."""

    port: int
    file: Path

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def received(self, path: str | None = None) -> list[dict[str, Any]]:
        """Return the complete requests so far, of one path if one is given."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        requests = [json.loads(line) for line in lines]
        return [request for request in requests if path in (None, request["path"])]


@contextmanager
def receiving(folder: Path) -> Iterator[Receiver]:
    """Run a receiver for the duration of the block."""
    file = folder / "received.jsonl"
    process = subprocess.Popen([sys.executable, __file__, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Receiver(port=int(process.stdout.readline()), file=file)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def main(file: Path) -> None:
    lock, seen = threading.Lock(), Counter[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            content = self.rfile.read(length)
            if len(content) < length:  # the sender was killed in the middle of it
                self.close_connection = True
                return
            body = content.decode()
            with lock:
                seen[self.path] += 1
                count = seen[self.path]
                request = {"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}, "body": body}
                with file.open("a") as out:
                    out.write(json.dumps(request) + "\n")
            if self.path == "/slow":
                threading.Event().wait()
            self._answer(count)

        def _answer(self, count: int) -> None:
            status = {"/fail": 500, "/later": 503, "/gone": 410, "/away": 307}.get(self.path, 200)
            if self.path.startswith("/once/") and count <= int(self.path.rsplit("/", 1)[1]):
                status = 500
            self.send_response(status)
            if status == 503:
                self.send_header("Retry-After", "3600")
            if status == 307:
                self.send_header("Location", "/ok")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
