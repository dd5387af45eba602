"""The embedded service with its real processes: start, restart, stop, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.cli.embedded import EmbeddedOptions, EmbeddedService, HomeInUse, PortTaken, StartFailed, is_ready
from app.cli.private_redis import NO_REDIS, RedisChoice, RedisKind, choices
from app.settings import load_settings
from tests.e2e.installation import forking
from tests.fork_server import ForkServer
from tests.servers import free_port, redis_executable
from tests.waiting import all_gone, is_gone, wait_until

Embedded = Callable[..., EmbeddedService]
DEEPE = (sys.executable, "-P", "-m", "app.cli")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def embedded(home: Path, worker_forks: ForkServer) -> Embedded:
    """Return what makes a service whose API and worker are forked; what users start is under `TestDevCommand`."""

    def make(*, redis: RedisChoice = NO_REDIS, said: list[str] | None = None) -> EmbeddedService:
        settings = load_settings(home=home, port=0, node_name="test")
        start = forking(worker_forks, home)
        options = EmbeddedOptions(redis=(redis, NO_REDIS), log_folder=home / "process-logs", start_process=start)
        return EmbeddedService(settings, options, say=(said if said is not None else []).append)

    return make


def descendants() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


@pytest.fixture(autouse=True)
def _nothing_left(worker_forks: ForkServer) -> Iterator[None]:
    before = set(descendants())
    yield
    left = [pid for pid in descendants() if pid not in before]
    wait_until(lambda: all_gone(left), "the end of what the test started")


class TestEmbeddedService:
    def test_starts_without_any_redis_restarts_what_is_killed_and_leaves_nothing(self, embedded: Embedded) -> None:
        said: list[str] = []
        service = embedded(said=said)
        url = service.start()
        first = service.pids

        nodes = wait_until(lambda: httpx.get(f"{url}/api/v1/nodes", timeout=None).json()["items"], "the node")
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: len(service.pids) == 2 and set(service.pids.values()).isdisjoint(first.values()), "new processes"
        )
        wait_until(lambda: is_ready(url), "the API")
        second = service.pids
        service.stop()

        assert [node["name"] for node in nodes] == ["test"]
        assert set(first) == {"api", "worker"}
        assert sorted(line.partition(" ended")[0] for line in said) == ["api", "worker"]
        assert all_gone([*first.values(), *second.values()])
        assert not is_ready(url)

    def test_keeps_the_data_of_its_private_redis_and_ends_it(self, home: Path, embedded: Embedded) -> None:
        choice = RedisChoice(RedisKind.WHEEL, executable=Path(redis_executable()))
        service = embedded(redis=choice)
        url = service.start()
        redis = service.pids["redis"]

        ready = httpx.get(f"{url}/readyz").json()
        given = next(child.spec.env for child in service._children if child.spec.name == "worker")
        service.stop()

        assert ready == {"status": "ready", "degraded": []}
        assert service.redis.kind is RedisKind.WHEEL
        assert is_gone(redis)
        # what the worker hands on to scripts, which know host and port only
        assert f"\nport {given['AI_PY_REDIS_START_PORT']}\n" in (home / "redis" / "redis.conf").read_text()
        files = {file.name: file.stat().st_mode & 0o077 for file in (home / "redis").rglob("*")}
        assert {"redis.conf", "redis.log"} < set(files)
        assert set(files.values()) == {0}

    def test_goes_on_without_a_redis_that_does_not_start(self, embedded: Embedded, tmp_path: Path) -> None:
        broken = tmp_path / "redis-server"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        said: list[str] = []
        service = embedded(redis=RedisChoice(RedisKind.ON_PATH, executable=broken), said=said)

        service.start()
        service.stop()

        assert service.redis is NO_REDIS
        assert any("does not start" in line for line in said)

    def test_refuses_a_home_that_another_one_uses(self, embedded: Embedded) -> None:
        first, second = embedded(), embedded()
        url = first.start()

        with pytest.raises(HomeInUse, match=url):
            second.start()
        still_there = is_ready(url)
        first.stop()

        assert still_there

    def test_proposes_a_port_when_its_own_is_taken(self, home: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            settings = load_settings(home=home, port=listener.getsockname()[1])
            service = EmbeddedService(settings, EmbeddedOptions(), say=print)

            with pytest.raises(PortTaken) as taken:
                service.start()

        assert "--port" in taken.value.notes[0]

    def test_says_why_the_api_did_not_start(
        self, home: Path, embedded: Embedded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service = embedded()
        monkeypatch.setenv("DEEPE_LICENSE_PUBLIC_KEY", str(home / "nowhere.pem"))

        with pytest.raises(StartFailed) as failed:
            service.start()

        assert "nowhere.pem" in "\n".join(failed.value.notes)


class TestDevCommand:
    def start(self, home: Path, *arguments: str) -> tuple["subprocess.Popen[str]", dict[str, Any]]:
        command = [*DEEPE, "dev", "--home", str(home), "--port", str(free_port()), "--no-redis", "--json", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        return process, json.loads(line)

    def test_ends_in_order_on_an_interrupt(self, home: Path) -> None:
        process, ready = self.start(home)

        status = self.end(process, signal.SIGINT)

        assert status == 0
        assert ready["redis"] == "none"
        assert all_gone(list(ready["processes"].values()))

    def test_leaves_nothing_when_it_is_killed_and_can_be_started_again_at_once(self, home: Path) -> None:
        first, ready = self.start(home)
        self.end(first, signal.SIGKILL)

        second, again = self.start(home)
        old_ones_gone = all_gone(list(ready["processes"].values()))
        status = self.end(second, signal.SIGTERM)

        assert old_ones_gone
        assert status == 0
        assert all_gone(list(again["processes"].values()))

    def end(self, process: "subprocess.Popen[str]", number: signal.Signals) -> int:
        """Send the signal and return the exit status."""
        process.send_signal(number)
        process.communicate()
        return process.returncode


def test_a_bare_machine_has_no_redis_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert [choice.kind for choice in choices(None, wheel=lambda: None)] == [RedisKind.NONE]
