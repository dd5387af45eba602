"""The children of the embedded service, with tiny programs in their place."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli.processes import ManagedProcess, ProcessSpec, Watchdog, describe_exit
from tests.waiting import all_gone, is_gone, wait_until

SLEEPER = "import time; time.sleep(60)"


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


def managed(watchdog: Watchdog, tmp_path: Path, program: str, *, said: list[str] | None = None) -> ManagedProcess:
    argv = (sys.executable, "-c", program)
    spec = ProcessSpec(name="child", argv=argv, env=os.environ, log=tmp_path / "child.log", grace_seconds=5.0)
    return ManagedProcess(spec, watchdog=watchdog, say=(said if said is not None else []).append)


class TestManagedProcess:
    def test_starts_a_killed_child_again_and_says_so(self, watchdog: Watchdog, tmp_path: Path) -> None:
        said: list[str] = []
        child = managed(watchdog, tmp_path, SLEEPER, said=said)
        child.start()
        child.keep()
        first = child.pid
        assert first is not None

        os.kill(first, signal.SIGKILL)
        second = wait_until(lambda: child.pid if child.pid != first else None, "another child")
        child.stop()

        assert said == ["child ended (SIGKILL); starting it again in 0.5 s"]
        assert all_gone([first, second])

    def test_waits_longer_before_each_start_of_a_child_that_keeps_ending(
        self, watchdog: Watchdog, tmp_path: Path
    ) -> None:
        said: list[str] = []
        child = managed(watchdog, tmp_path, "raise SystemExit(3)", said=said)
        child.start()
        child.keep()

        wait_until(lambda: len(said) >= 2, "two ends of the child")
        child.stop()

        assert [line.rpartition(" in ")[2] for line in said[:2]] == ["0.5 s", "1 s"]
        assert "exit code 3" in said[0]

    def test_keeps_the_log_of_every_start_but_not_of_an_earlier_run(self, watchdog: Watchdog, tmp_path: Path) -> None:
        (tmp_path / "child.log").write_text("of yesterday\n")
        said: list[str] = []
        child = managed(watchdog, tmp_path, "print('hello', flush=True)", said=said)
        child.start()
        child.keep()

        wait_until(lambda: len(said) >= 2, "two ends of the child")
        child.stop()

        assert set(child.log_tail()) == {"hello"}
        assert len(child.log_tail()) >= 2

    def test_kills_a_child_that_ignores_the_polite_signal(self, watchdog: Watchdog, tmp_path: Path) -> None:
        stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
        said: list[str] = []
        child = managed(watchdog, tmp_path, stubborn, said=said)
        child.start()
        wait_until(child.log_tail, "the first line")
        pid = child.pid

        child.stop(grace_seconds=0.2)

        assert said == ["child does not end; killing it"]
        assert pid is not None
        assert is_gone(pid)

    def test_ends_what_the_child_left_in_its_group(self, watchdog: Watchdog, tmp_path: Path) -> None:
        leaves = (
            "import subprocess, sys\n"
            f"print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).pid, flush=True)\n"
            "import time; time.sleep(60)"
        )
        child = managed(watchdog, tmp_path, leaves)
        child.start()
        grandchild = int(wait_until(child.log_tail, "the grandchild's pid")[0])

        child.stop()

        wait_until(lambda: is_gone(grandchild), "the grandchild's end")

    def test_does_nothing_when_stopped_before_the_start_and_twice(self, watchdog: Watchdog, tmp_path: Path) -> None:
        child = managed(watchdog, tmp_path, SLEEPER)
        child.stop()
        child.start()

        child.stop()
        child.stop()

        assert child.pid is None


class TestWatchdog:
    def test_ends_the_children_when_their_parent_is_killed(self, tmp_path: Path) -> None:
        parent_program = (
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "from app.cli.processes import Watchdog, ManagedProcess, ProcessSpec\n"
            f"spec = ProcessSpec('child', (sys.executable, '-c', {SLEEPER!r}), os.environ, Path(sys.argv[1]))\n"
            "watchdog = Watchdog()\n"
            "child = ManagedProcess(spec, watchdog=watchdog, say=print)\n"
            "child.start()\n"
            "print(child.pid, watchdog.pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", parent_program, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        child, watchdog = (int(pid) for pid in parent.stdout.readline().split())

        parent.kill()
        parent.wait()
        parent.stdout.close()

        wait_until(lambda: all_gone([child, watchdog]), "the end of child and watchdog")

    def test_leaves_a_group_alone_that_it_was_told_to_forget(self, tmp_path: Path) -> None:
        """Its number may be another's by now."""
        watchdog = Watchdog()
        child = managed(watchdog, tmp_path, SLEEPER)
        child.start()
        pid = child.pid
        assert pid is not None

        watchdog.forget(pid)
        watchdog.close()
        left_alone = not is_gone(pid)
        child.stop()

        assert left_alone


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit code 0"), (7, "exit code 7"), (-9, "SIGKILL"), (-99, "signal 99")]
)
def test_describes_how_a_process_ended(code: int, words: str) -> None:
    assert describe_exit(code) == words
