"""What a contained process sees: real bubblewrap on real folders, and the supervisor that owns such a process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from app.domain.containment import ContainmentMode, ContainmentReason, ContainmentWish, StageNetwork
from app.executor.containment import probe
from app.executor.containment.sandbox import MAX_ENTRIES, Sandbox, with_links
from app.executor.supervisor.client import ExitWhy, LaunchSpec, observe, prepare, request_stop, start
from tests.bubblewrap import bubblewrap
from tests.waiting import wait_until

SHELL = "/bin/sh"


def run(sandbox: Sandbox, script: str, *, at: Path = Path("/")) -> "subprocess.CompletedProcess[str]":
    """Run a shell script in the sandbox."""
    command = sandbox.command(bubblewrap().program, (SHELL, "-c", script), at)
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with files that are to be hidden, read and written."""
    for name in ("secret", "known", "out"):
        (tmp_path / "home" / name).mkdir(parents=True)
        (tmp_path / "home" / name / "file").write_text(name)
    return tmp_path / "home"


class TestSandbox:
    def test_shows_of_a_hidden_folder_what_it_may(self, place: Path) -> None:
        sandbox = Sandbox(hidden=(place,), readable=(place / "known",), writable=(place / "out",))

        done = run(sandbox, f"cd {place} && ls && cat known/file && echo new > out/file")

        assert (done.returncode, done.stdout) == (0, "known\nout\nknown")
        assert (place / "out" / "file").read_text() == "new\n"

    @pytest.mark.parametrize("path", ["made", "known/made", "known/file", "../beside"])
    def test_lets_nothing_else_be_written(self, place: Path, path: str) -> None:
        done = run(Sandbox(hidden=(place,), readable=(place / "known",)), f"echo x > {place}/{path}")

        assert done.returncode != 0
        assert "Read-only file system" in done.stderr

    def test_hides_a_file(self, place: Path) -> None:
        done = run(Sandbox(hidden=(place / "secret" / "file",)), f"cat {place}/secret/file {place}/known/file")

        assert done.stdout == "known"

    def test_takes_what_is_left_beside_the_entries_of_a_layered_folder(self, place: Path, tmp_path: Path) -> None:
        sandbox = Sandbox(hidden=(place,), layered={place: tmp_path / "own"})

        done = run(sandbox, "cat known/file && echo mine > new && mkdir folder && ls && ! rm known/file", at=place)

        assert (done.returncode, done.stdout) == (0, "knownfolder\nknown\nnew\nout\nsecret\n")
        assert sorted(os.listdir(place)) == ["known", "out", "secret"]
        assert (tmp_path / "own" / "new").read_text() == "mine\n"

    def test_shows_a_large_layered_folder_read_only(self, place: Path, tmp_path: Path) -> None:
        for number in range(MAX_ENTRIES):
            (place / f"{number}").touch()

        done = run(
            Sandbox(hidden=(place,), layered={place: tmp_path / "own"}), "cat known/file; echo x > new", at=place
        )

        assert done.stdout == "known"
        assert "Read-only file system" in done.stderr

    def test_follows_links_as_the_machine_does(self, place: Path, tmp_path: Path) -> None:
        (tmp_path / "disk" / "env").mkdir(parents=True)
        (tmp_path / "disk" / "env" / "file").write_text("through two links")
        (tmp_path / "disk" / "alias").symlink_to("env")
        (place / "env").symlink_to("../disk/alias")
        sandbox = Sandbox(hidden=(place, tmp_path / "disk"), readable=(place / "env",))

        done = run(sandbox, f"cat {place}/env/file && ls {tmp_path}/disk {place}")

        assert done.stdout == f"through two links{tmp_path}/disk:\nalias\nenv\n\n{place}:\nenv\n"

    def test_shows_no_process_of_others_and_has_no_rights(self) -> None:
        done = run(Sandbox(), f"kill -0 {os.getpid()}; ls /proc | grep -c '^[0-9]'; grep CapEff /proc/self/status")

        assert "No such process" in done.stderr
        shown, _, capabilities = done.stdout.partition("\n")
        assert int(shown) < 10
        assert capabilities.split() == ["CapEff:", "0" * 16]

    def test_has_a_loopback_of_its_own_without_a_network(self) -> None:
        shown = [run(Sandbox(network=network), "cat /proc/net/dev").stdout for network in (True, False)]

        assert shown[0].count(":") == Path("/proc/net/dev").read_text().count(":")
        assert [line.split(":")[0].strip() for line in shown[1].splitlines()[2:]] == ["lo"]


class TestWithLinks:
    def test_ends_where_links_go_in_circles(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")

        real, links = with_links(tmp_path / "a")

        assert real.name in ("a", "b")
        assert set(links.values()) == {"a", "b"}


class TestProbe:
    def test_says_why_stages_are_not_contained(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        absent, _ = probe.find_containment(ContainmentWish.AUTO, StageNetwork.ALL)
        broken = tmp_path / "bwrap"
        broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        broken.chmod(0o755)

        refused, program = probe.find_containment(ContainmentWish.AUTO, StageNetwork.ALL)

        assert (absent.mode, absent.reason) == (ContainmentMode.OFF, ContainmentReason.NOT_INSTALLED)
        assert (refused.mode, refused.reason) == (ContainmentMode.OFF, ContainmentReason.PROBE_FAILED)
        assert refused.detail == "bwrap: No permissions to create new namespace"
        assert program is None

    def test_does_not_believe_a_sandbox_that_contains_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        through = tmp_path / "bwrap"
        through.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
        through.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])

        found, _ = probe.find_containment(ContainmentWish.AUTO, StageNetwork.ALL)

        assert (found.mode, found.detail) == (ContainmentMode.OFF, "a hidden folder is seen")

    @pytest.mark.parametrize(
        ("wish", "network"),
        [
            (ContainmentWish.BUBBLEWRAP, StageNetwork.ALL),
            (ContainmentWish.AUTO, StageNetwork.NONE),
            (ContainmentWish.OFF, StageNetwork.NONE),
        ],
    )
    def test_refuses_what_it_cannot_give(
        self, wish: ContainmentWish, network: StageNetwork, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(probe.ContainmentUnavailable):
            probe.find_containment(wish, network)


class TestSupervisedSandbox:
    """The supervisor knows of a contained script what it knows of others."""

    def launch(self, tmp_path: Path, python: str, *, sandbox: Sandbox | None = None, grace_seconds: float = 20) -> Path:
        """Start a Python program in a sandbox and return its control folder."""
        folder, output = tmp_path / "attempt", tmp_path / "output.log"
        argv = (sys.executable, "-S", "-u", "-c", python)
        sandbox = sandbox or Sandbox(writable=(tmp_path,))
        spec = LaunchSpec(
            attempt_id=f"contained-{os.getpid()}-{tmp_path.name}",
            argv=sandbox.command(bubblewrap().program, argv, tmp_path),
            cwd=tmp_path,
            env={"PATH": os.defpath},
            output=output,
            grace_seconds=grace_seconds,
            sandboxed=True,
        )
        prepare(folder, spec)
        start(folder)
        return folder

    def ended(self, folder: Path) -> Mapping[str, object]:
        wait_until(lambda: observe(folder).exit, "the end")
        record: dict[str, object] = json.loads((folder / "exit.json").read_bytes())
        return record

    def test_reports_exit_and_use(self, tmp_path: Path) -> None:
        record = self.ended(self.launch(tmp_path, "held = bytearray(150 << 20); raise SystemExit(7)"))

        assert (record["why"], record["code"], record["leftovers"]) == (ExitWhy.EXITED, 7, 0)
        used = record["max_rss_bytes"]
        assert isinstance(used, int)
        assert used > 150 << 20

    def test_reports_a_signal_as_shells_do(self, tmp_path: Path) -> None:
        record = self.ended(self.launch(tmp_path, "import os; os.kill(os.getpid(), 9)"))

        assert (record["why"], record["code"], record["signal"]) == (ExitWhy.EXITED, 128 + signal.SIGKILL, None)

    def test_says_that_a_sandbox_could_not_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "gone").mkdir()
        sandbox = Sandbox(writable=(tmp_path, tmp_path / "gone"), hidden=(tmp_path,))
        folder, output = tmp_path / "attempt", tmp_path / "output.log"
        argv = sandbox.command(bubblewrap().program, (SHELL, "-c", "true"), Path("/"))
        (tmp_path / "gone").rmdir()
        broken = [word if word != str(tmp_path / "gone") else "/nowhere" for word in argv]
        prepare(folder, LaunchSpec("broken", tuple(broken), tmp_path, {}, output, sandboxed=True))
        start(folder)

        record = self.ended(folder)

        assert (record["why"], record["started_at"]) == (ExitWhy.SPAWN_FAILED, None)
        assert str(record["error"]).startswith("bwrap: Can't find source path /nowhere")

    def test_does_not_take_a_script_that_talks_like_bubblewrap_for_one(self, tmp_path: Path) -> None:
        record = self.ended(self.launch(tmp_path, "print('bwrap: No permissions'); raise SystemExit(1)"))

        assert (record["why"], record["code"]) == (ExitWhy.EXITED, 1)

    def test_gives_a_script_its_grace_when_it_is_stopped(self, tmp_path: Path) -> None:
        waits = (
            "import signal, sys, time\n"
            "def leave(*_):\n    open('saved', 'w').close(); sys.exit(5)\n"
            "signal.signal(signal.SIGTERM, leave); open('ready', 'w').close()\n"
            "while True: time.sleep(0.05)\n"
        )
        folder = self.launch(tmp_path, waits)
        wait_until((tmp_path / "ready").exists, "the script")

        request_stop(folder, "cancelled")
        record = self.ended(folder)

        assert (record["why"], record["code"], record["stop_reason"]) == (ExitWhy.STOPPED, 5, "cancelled")
        assert (tmp_path / "saved").exists()

    def test_ends_what_a_script_left_and_says_what_that_was(self, tmp_path: Path) -> None:
        leaves = "import subprocess; subprocess.Popen(['sleep', '987'], start_new_session=True)"
        folder = self.launch(tmp_path, leaves, grace_seconds=0.2)
        record = self.ended(folder)

        assert (record["why"], record["code"], record["unkillable"]) == (ExitWhy.EXITED, 0, 0)
        assert record["leftovers"] == 2  # and the first process of the sandbox

    def test_ends_with_its_recorded_process(self, tmp_path: Path) -> None:
        folder = self.launch(tmp_path, "import time; open('ready', 'w').close()\nwhile True: time.sleep(0.05)")
        wait_until((tmp_path / "ready").exists, "the script")
        process = observe(folder).process
        assert process is not None

        os.kill(process.pid, signal.SIGKILL)
        record = self.ended(folder)

        assert (record["signal"], record["unkillable"]) == (signal.SIGKILL, 0)
        assert isinstance(record["leftovers"], int)
