"""A service with real processes in a temporary home, for benchmarks that go through HTTP."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.access import licence as licences
from app.cli.embedded import is_ready
from app.cli.private_redis import NO_REDIS, RedisChoice, RedisKind
from tests.e2e.installation import Installation
from tests.servers import free_port, private_redis
from tests.worker.harness import make_base


@contextmanager
def running_service(
    *, redis: bool, environments: Mapping[str, Path] | None = None, **variables: str
) -> Iterator[Installation]:
    """Yield a licensed service with the samples of Custom01; its node has the environment `base`.

    It polls the database as seldom as a real one does.
    """
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (base,) = make_base(root / "base")
        choice = NO_REDIS
        if redis:
            (root / "redis").mkdir()
            server = stack.enter_context(private_redis(root / "redis"))
            choice = RedisChoice(RedisKind.CONFIGURED, url=f"redis://127.0.0.1:{server.port}")
        found = {"base": base, **(environments or {})}
        settings = {"DEEPE_POLL_SECONDS": "2", **variables}
        site = Installation(root, found, forks=None, redis=choice, **settings)
        stack.callback(site.close)
        site.install_licence()
        site.start()
        site.add_samples()
        yield site


def base_interpreter(site: Installation) -> Path:
    """Return the interpreter that the node runs stages of `base` with."""
    return site.node_home / "envs" / "base" / "bin" / "python"


@dataclass(frozen=True)
class ApiProcess:
    """An API process of its own on a new home, without a worker."""

    home: Path
    port: int
    pid: int

    def processor_seconds(self) -> float:
        """Return the processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def switches(self) -> int:
        """Return how often its threads have waited for something."""
        found = Path(f"/proc/{self.pid}/task").glob("*/status")
        lines = (line for status in found for line in status.read_text().splitlines())
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


@contextmanager
def api_process(*, licensed: bool = False, **variables: str) -> Iterator[ApiProcess]:
    """Yield the API once it is ready; it has no settings of the person who measures, and these."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEEPE_")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        home, port = Path(name) / "home", free_port()
        environment |= {"DEEPE_HOME": str(home), "DEEPE_MIN_FREE_BYTES": "0", "DEEPE_LOG_LEVEL": "warning", **variables}
        if licensed:
            environment["DEEPE_LICENSE_PUBLIC_KEY"] = str(_install_licence(Path(name)))
        command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                while not is_ready(f"http://127.0.0.1:{port}"):
                    if process.poll() is not None:
                        raise RuntimeError(f"the API ended with {process.returncode}")
                    time.sleep(0.05)
                yield ApiProcess(home, port, process.pid)
            finally:
                process.terminate()


def _install_licence(root: Path) -> Path:
    """Put a licence of a day into the home below `root`; return the public key of who issued it."""
    private, public = licences.keygen(root / "vendor")
    now = datetime.now(UTC)
    text = licences.issue(
        licences.load_private_key(private),
        licensee="measured",
        issued_at=now - timedelta(days=1),
        expires_at=now + timedelta(days=1),
    )
    file = licences.licence_path(root / "home")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return public
