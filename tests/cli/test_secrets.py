"""Secrets of real processes: what the system shows of them to other processes of the account."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from app.cli.embedded import is_ready
from tests.servers import free_port
from tests.waiting import all_gone, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DEEPE = (sys.executable, "-P", "-m", "app.cli")
API, METRICS, JOIN = "api-kQ8vTz2mYw4rBn7x", "metrics-kQ8vTz2mYw4rBn7x", "join-kQ8vTz2mYw4rBn7x"


@contextmanager
def running(*arguments: str, log: Path, **variables: str) -> Iterator[psutil.Process]:
    """Run a command of the service; at the end it and all that it started have ended."""
    with log.open("wb") as output:
        process = psutil.Popen([*DEEPE, *arguments], env=os.environ | variables, stdout=output, stderr=output)
    try:
        yield process
    finally:
        family = [process.pid, *(child.pid for child in process.children(recursive=True))]
        process.terminate()
        process.wait()
        wait_until(lambda: all_gone(family), "the end of all processes")


def shown(process: psutil.Process) -> dict[str, str]:
    """Return what each process of a tree shows as its environment, by its command line."""
    family = [process, *process.children(recursive=True)]
    return {" ".join(one.cmdline()): _environ(one.pid) for one in family}


def _environ(pid: int) -> str:
    """Return what the system shows; nothing where the process is closed to others and we are not root."""
    try:
        return Path(f"/proc/{pid}/environ").read_text()
    except PermissionError:
        return ""


def leaks(process: psutil.Process, *secrets: str) -> list[str]:
    return [command for command, environ in shown(process).items() if any(secret in environ for secret in secrets)]


class TestProcessesOfTheService:
    def test_dev_hands_secrets_to_who_needs_them_and_shows_none(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text(API + "\n")
        port, database = free_port(), f"sqlite:///{tmp_path / 'secret.db'}"
        variables = {
            "DEEPE_API_TOKEN_FILE": str(tmp_path / "token"),
            "DEEPE_METRICS_TOKEN": METRICS,
            "DEEPE_JOIN_TOKEN": JOIN,
            "DEEPE_DATABASE_URL": database,
        }

        with running(
            "dev", "--home", str(tmp_path / "home"), "--port", str(port), log=tmp_path / "log", **variables
        ) as process:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: is_ready(url), "a ready service")
            answers = {
                token: httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {token}"}).status_code
                for token, path in ((API, "/api/v1/nodes"), (METRICS, "/metrics"), (JOIN, "/api/v1/nodes"))
            }
            headers = {"Authorization": f"Bearer {API}"}
            nodes = wait_until(lambda: httpx.get(f"{url}/api/v1/nodes", headers=headers).json()["items"], "a node")
            commands = wait_until(lambda: [name for name in shown(process) if name.endswith("worker")], "a worker")
            found = wait_until(
                lambda: not leaks(process, API, METRICS, JOIN, "secret.db", "unix://deepe"), "hidden secrets"
            )

        assert answers == {API: 200, METRICS: 200, JOIN: 401}
        assert len(nodes) == 1
        assert len(commands) == 1
        assert found

    def test_several_api_processes_get_their_secrets_and_show_none(self, tmp_path: Path) -> None:
        port = free_port()
        variables = {"DEEPE_API_TOKEN": API, "DEEPE_HOME": str(tmp_path / "home"), "DEEPE_PORT": str(port)}

        with running("serve", "--processes", "2", log=tmp_path / "log", **variables) as process:
            wait_until(lambda: is_ready(f"http://127.0.0.1:{port}"), "a ready service")
            headers = {"Authorization": f"Bearer {API}"}
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/nodes", headers=headers)
            trackers = [name for name in shown(process) if "resource_tracker" in name]
            hidden = wait_until(lambda: not leaks(process, API), "hidden secrets")

        assert answer.status_code == 200
        assert len(trackers) == 1
        assert hidden

    def test_worker_needs_no_token_and_shows_none(self, tmp_path: Path) -> None:
        variables = {
            "DEEPE_HOST": "0.0.0.0",
            "DEEPE_HOME": str(tmp_path / "home"),
            "DEEPE_DATABASE_URL": f"sqlite:///{tmp_path / 'secret.db'}",
            "DEEPE_LOG_FORMAT": "json",
        }
        environ = os.environ | variables
        subprocess.run([*DEEPE, "migrate"], env=environ, check=True, capture_output=True)

        with running("worker", log=tmp_path / "log", **variables) as process:
            wait_until(lambda: "worker_started" in (tmp_path / "log").read_text(), "a worker")
            found = leaks(process, "secret.db")

        assert found == []


def test_hidden_secrets_are_gone_for_children_and_the_memory_is_closed() -> None:
    program = (
        "import ctypes, os, subprocess\n"
        "from app.secret_values import hide_secrets\n"
        "hide_secrets()\n"
        "print(subprocess.run(['env'], capture_output=True, text=True).stdout)\n"
        "print(open('/proc/self/environ').read())\n"
        "print('dumpable', ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
        "print('children', subprocess.run(['cat', '/proc/self/environ'], capture_output=True).returncode)\n"
    )
    variables = {"DEEPE_API_TOKEN": API, "DEEPE_METRICS_TOKEN_FILE": "/run/secrets/m", "DEEPE_HOME": "/srv/deepe"}

    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, check=True
    )

    assert API not in done.stdout
    assert "DEEPE_METRICS_TOKEN_FILE" not in done.stdout.partition("dumpable")[0].partition("\0")[0]
    assert "DEEPE_HOME=/srv/deepe" in done.stdout
    assert "dumpable 0" in done.stdout
    assert "children 0" in done.stdout
