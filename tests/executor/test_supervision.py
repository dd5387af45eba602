"""The worker's view: what each state of a folder looks like, and what removing and listing do."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.executor.supervisor import client
from app.executor.supervisor.client import AttemptIsSupervised, AttemptPhase, ForkServer, Observation
from tests.executor.attempts import Attempt, attempts
from tests.waiting import wait_until

SLEEP = "import time\nprint('ready')\ntime.sleep(60)"


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    for make in attempts(tmp_path):
        yield make()


class TestObserve:
    def test_sees_absent_prepared_running_exited(self, attempt: Attempt) -> None:
        absent = attempt.observe()
        attempt.prepare(SLEEP)
        prepared = attempt.observe()
        client.start(attempt.folder)
        attempt.wait_for_line("ready")
        running, command = attempt.observe(), attempt.stage().cmdline()
        client.request_stop(attempt.folder, "cancel")
        attempt.wait_for_end()
        exited = attempt.observe()

        assert absent == Observation(phase=AttemptPhase.ABSENT, supervised=False)
        assert prepared == Observation(phase=AttemptPhase.PREPARED, supervised=False)
        assert (running.phase, running.supervised, running.exit) == (AttemptPhase.RUNNING, True, None)
        assert running.process is not None
        assert command[1:3] == ["-u", "-c"]
        assert running.started_at is not None
        assert running.heartbeat_age is not None
        assert running.heartbeat_age >= 0
        assert (exited.phase, exited.supervised) == (AttemptPhase.EXITED, False)
        assert exited.exit is not None

    def test_sees_started_if_supervisor_died_before_it_recorded_the_stage(self, attempt: Attempt) -> None:
        attempt.prepare(SLEEP)
        attempt.supervise(fault_point="before-record").wait()

        seen = attempt.observe()

        assert (seen.phase, seen.supervised, seen.process) == (AttemptPhase.STARTED, False, None)

    def test_has_no_heartbeat_age_after_a_reboot(self, attempt: Attempt) -> None:
        attempt.prepare(SLEEP)
        state = {"pid": 1, "start": "1", "boot_id": "another", "heartbeat": {"wall": 5.0, "boot": 7.0}}
        (attempt.folder / "state.json").write_text(json.dumps(state))

        seen = attempt.observe()

        assert (seen.heartbeat_at, seen.heartbeat_age) == (5.0, None)

    def test_does_not_keep_a_supervisor_from_its_lock(self, attempt: Attempt) -> None:
        attempt.prepare("print('ran')")
        observer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from pathlib import Path; from app.executor.supervisor import client\n"
                "while client.observe(Path(sys.argv[1])).exit is None: pass",
                str(attempt.folder),
            ]
        )

        client.start(attempt.folder)

        assert attempt.wait_for_end().code == 0
        assert observer.wait() == 0

    def test_works_for_an_attempt_that_another_worker_started(self, attempt: Attempt) -> None:
        attempt.prepare(SLEEP)
        code = (
            "import sys; from pathlib import Path; from app.executor.supervisor import client; "
            "client.start(Path(sys.argv[1]))"
        )

        subprocess.run([sys.executable, "-c", code, str(attempt.folder)], check=True)
        attempt.wait_for_line("ready")

        assert attempt.observe().supervised
        assert attempt.supervisor().parent() != attempt.stage()
        client.request_stop(attempt.folder, "cancel")
        assert attempt.wait_for_end().stop_reason == "cancel"


class TestForkServer:
    def test_starts_and_adopts_supervisors_that_are_independent_of_it(self, attempt: Attempt) -> None:
        attempt.prepare(f"import os\nprint(os.listdir('/dev/fd'))\nopen(JOURNAL, 'a').write('run\\n')\n{SLEEP}")

        with ForkServer() as forks:
            for _ in range(3):
                client.start(attempt.folder, forks)
            attempt.wait_for_line("ready")
            first = attempt.supervisor()
            first.kill()
            wait_until(lambda: not attempt.observe().supervised, "the end of the supervisor")
            client.adopt(attempt.folder, forks)
            wait_until(lambda: attempt.observe().supervised, "another supervisor")
            server = process_of(forks)
        wait_until(lambda: attempt.supervisor() != first, "the new state")
        second = attempt.supervisor()

        assert not server.is_running()
        assert [os.getsid(one.pid) == one.pid for one in (second, attempt.reaper(), attempt.stage())] == [True] * 3
        assert second.parent() not in (server, psutil.Process())
        assert Path(second.cwd()) == attempt.folder
        client.request_stop(attempt.folder, "cancel")
        assert attempt.wait_for_end().stop_reason == "cancel"
        assert attempt.runs() == 1
        assert len(attempt.output.read_text().split(",")) == 4  # stdin, stdout, stderr, and what lists them

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_one_that_is_gone_or_frozen_is_replaced(
        self, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)
        for make in attempts(tmp_path):
            with ForkServer() as forks:
                lost = process_of(forks)
                lost.send_signal(number)
                for attempt in (make(), make()):
                    attempt.prepare("open(JOURNAL, 'a').write('run\\n')")
                    client.start(attempt.folder, forks)
                    assert attempt.wait_for_end().code == 0
                    assert attempt.runs() == 1

                assert not lost.is_running()
                assert process_of(forks).is_running()

    def test_refuses_a_folder_that_is_gone_and_goes_on(self, attempt: Attempt, tmp_path: Path) -> None:
        with ForkServer() as forks:
            server = process_of(forks)
            with pytest.raises(FileNotFoundError):
                client.start(tmp_path / "gone", forks)
            attempt.prepare("")
            client.start(attempt.folder, forks)

            assert attempt.wait_for_end().code == 0
            assert process_of(forks) == server

    def test_ends_with_its_worker_whatever_that_died_of(self, attempt: Attempt) -> None:
        attempt.prepare(SLEEP)
        code = (
            "import sys; from pathlib import Path; from app.executor.supervisor import client\n"
            "with client.ForkServer() as forks:\n"
            "    client.start(Path(sys.argv[1]), forks)\n"
            "    print('started', flush=True)\n"
            "    sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", code, str(attempt.folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"started\n"
            (server,) = psutil.Process(worker.pid).children()
            attempt.wait_for_line("ready")
            worker.kill()
        wait_until(lambda: not server.is_running(), "the end of the fork server")

        assert attempt.observe().supervised
        client.request_stop(attempt.folder, "cancel")
        assert attempt.wait_for_end().stop_reason == "cancel"


def process_of(forks: ForkServer) -> psutil.Process:
    """Return the process of the fork server."""
    assert forks._process is not None
    return psutil.Process(forks._process.pid)


class TestPrepare:
    def test_keeps_first_spec(self, attempt: Attempt) -> None:
        attempt.prepare("print('first')")

        attempt.prepare("print('second')")
        client.start(attempt.folder)
        attempt.wait_for_end()

        assert attempt.output.read_text() == "first\n"

    def test_hides_folder_from_others(self, attempt: Attempt) -> None:
        attempt.prepare("")

        assert stat.S_IMODE(attempt.folder.stat().st_mode) == 0o700


class TestRequestStop:
    def test_keeps_first_reason(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")

        client.request_stop(attempt.folder, "cancel")
        client.request_stop(attempt.folder, "shutdown")

        assert attempt.wait_for_end().stop_reason == "cancel"


class TestRemoveAndList:
    def test_lists_folders_sorted_and_nothing_else(self, tmp_path: Path) -> None:
        for name in ("b", "a", ".c.removed"):
            (tmp_path / name).mkdir()
        (tmp_path / "file").touch()

        assert [path.name for path in client.list_attempts(tmp_path)] == ["a", "b"]
        assert client.list_attempts(tmp_path / "absent") == []

    def test_refuses_to_remove_while_supervised(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")

        with pytest.raises(AttemptIsSupervised):
            client.remove(attempt.folder)

        assert attempt.observe().phase is AttemptPhase.RUNNING

    def test_removes_ended_attempt_and_accepts_absent_one(self, attempt: Attempt) -> None:
        attempt.start("")
        attempt.wait_for_end()

        client.remove(attempt.folder)
        client.remove(attempt.folder)

        assert list(attempt.folder.parent.iterdir()) == []
        assert attempt.output.exists()
        wait_until(lambda: attempt.survivors() == [], "no survivors")

    def test_finishes_removals_that_a_crash_cut_off(self, attempt: Attempt) -> None:
        attempt.prepare("")
        grave = attempt.folder.with_name(".gone.removed")
        grave.mkdir()
        (grave / "spec.json").touch()

        client.finish_removals(attempt.folder.parent)

        assert list(attempt.folder.parent.iterdir()) == [attempt.folder]
