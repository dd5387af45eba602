"""A stage process and its supervisor, as real processes that are really killed."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from app.executor.supervisor import client
from app.executor.supervisor.client import AttemptPhase, ExitWhy
from tests.executor.attempts import Attempt, attempts
from tests.waiting import all_gone, is_gone, wait_until

Maker = Callable[[], Attempt]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SLEEP = "import time\nprint('ready')\ntime.sleep(60)"
LEAVES_IN_ORDER = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + SLEEP
RUN_AND_SLEEP = "open(JOURNAL, 'a').write('run\\n')\n" + SLEEP
UNTIL_TOLD = """
import os, time
open(JOURNAL, 'a').write('run\\n')
print('ready')
while not os.path.exists(JOURNAL + '.go'):
    time.sleep(0.01)
raise SystemExit(7)
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Attempt]]:
    """Return a maker of attempts."""
    yield from attempts(tmp_path)


@pytest.fixture
def attempt(make: Callable[[], Attempt]) -> Attempt:
    return make()


class TestExit:
    @pytest.mark.parametrize("code", [0, 7])
    def test_records_exit_code_and_usage(self, attempt: Attempt, code: int) -> None:
        before = time.time()

        attempt.start(f"raise SystemExit({code})")
        record = attempt.wait_for_end()

        assert (record.why, record.code, record.signal) == (ExitWhy.EXITED, code, None)
        assert record.attempt_id == attempt.id
        assert record.max_rss_bytes is not None
        assert record.max_rss_bytes > 1_000_000
        assert record.started_at is not None
        assert before <= record.started_at <= record.finished_at <= time.time()
        assert (record.leftovers, record.unkillable, record.stop_reason) == (0, 0, None)

    def test_records_signal_and_no_code_if_script_dies_of_one(self, attempt: Attempt) -> None:
        attempt.start("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")

        record = attempt.wait_for_end()

        assert (record.why, record.code, record.signal) == (ExitWhy.EXITED, None, signal.SIGSEGV)

    def test_says_why_if_interpreter_is_missing(self, attempt: Attempt) -> None:
        attempt.start("", argv=("no-such-interpreter", "-u", "x.py"))

        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.SPAWN_FAILED, None)
        assert record.error == "no-such-interpreter: No such file or directory"
        assert record.started_at is None

    def test_says_why_if_a_name_is_not_text(self, attempt: Attempt) -> None:
        attempt.start("", argv=(os.fsdecode(b"no-\xfc"), "-u", "x.py"))

        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.SPAWN_FAILED, None)
        assert record.error == "no-\\udcfc: No such file or directory"

    def test_says_why_if_working_directory_is_missing(self, attempt: Attempt, tmp_path: Path) -> None:
        attempt.start("", cwd=tmp_path / "gone")

        record = attempt.wait_for_end()

        assert record.why is ExitWhy.SPAWN_FAILED
        assert record.error == f"{tmp_path / 'gone'}: No such file or directory"

    def test_keeps_every_byte_of_output_until_the_end(self, attempt: Attempt) -> None:
        attempt.start("import sys\nfor i in range(50_000): print('line', i)\nsys.stderr.write('last')")

        attempt.wait_for_end()

        assert attempt.output.read_text() == "".join(f"line {i}\n" for i in range(50_000)) + "last"


class TestSurroundings:
    def test_gives_script_exactly_the_given_environment_and_its_attempt(self, attempt: Attempt) -> None:
        attempt.start("import os, json\nprint(json.dumps(dict(os.environ)))", env={"ONLY": "this", "LC_ALL": "C.UTF-8"})

        attempt.wait_for_end()

        assert json.loads(attempt.output.read_text()) == {
            "ONLY": "this",
            "LC_ALL": "C.UTF-8",
            "DEEPE_ATTEMPT": attempt.id,
        }

    @linux_only
    def test_gives_script_own_session_no_input_and_no_stray_descriptors(self, attempt: Attempt) -> None:
        attempt.start(
            "import os, sys\n"
            "print(os.getsid(0) == os.getpgid(0) == os.getpid(), sys.stdin.read() == '')\n"
            "print(sorted(int(n) for n in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + n)))\n"
            "print(open('/proc/self/oom_score_adj').read().strip())"
        )

        attempt.wait_for_end()

        assert attempt.output.read_text().splitlines() == ["True True", "[0, 1, 2]", "500"]

    def test_gives_script_default_signal_handlers(self, attempt: Attempt) -> None:
        attempt.start(
            "import signal\nprint([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]"
            " == [signal.SIG_DFL] * 2, signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
        )

        attempt.wait_for_end()

        assert attempt.output.read_text() == "True True\n"

    def test_leaves_no_child_and_no_zombie_with_the_starter(self, attempt: Attempt) -> None:
        before = {child.pid for child in psutil.Process().children()}

        attempt.start(SLEEP)
        attempt.wait_for_line("ready")

        assert {child.pid for child in psutil.Process().children()} == before

    def test_keeps_spec_and_state_from_other_users(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")

        assert attempt.folder.stat().st_mode & 0o077 == 0
        assert {(attempt.folder / name).stat().st_mode & 0o077 for name in ("spec.json", "state.json")} == {0}


class TestStop:
    def test_ends_script_with_term_and_does_not_wait_for_the_grace(self, attempt: Attempt) -> None:
        attempt.start(SLEEP, grace_seconds=3600)
        attempt.wait_for_line("ready")

        client.request_stop(attempt.folder, "cancel")
        record = attempt.wait_for_end()

        assert (record.why, record.signal, record.stop_reason) == (ExitWhy.STOPPED, signal.SIGTERM, "cancel")

    def test_lets_script_clean_up_within_grace(self, attempt: Attempt) -> None:
        attempt.start(
            "import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print('saved'), sys.exit(3)))\n" + SLEEP,
            grace_seconds=3600,
        )
        attempt.wait_for_line("ready")

        client.request_stop(attempt.folder, "cancel")
        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.STOPPED, 3)
        assert attempt.output.read_text().endswith("saved\n")

    def test_kills_script_that_ignores_term_after_grace(self, attempt: Attempt) -> None:
        attempt.start("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP, grace_seconds=0.4)
        attempt.wait_for_line("ready")

        asked = time.time()
        client.request_stop(attempt.folder, "cancel")
        wait_until(lambda: attempt.observe().stopping or attempt.observe().exit is not None, "stopping")
        record = attempt.wait_for_end()

        assert (record.why, record.signal) == (ExitWhy.STOPPED, signal.SIGKILL)
        assert record.finished_at - asked >= 0.4

    def test_ends_whole_tree_whatever_its_children_do(self, attempt: Attempt) -> None:
        attempt.start(ESCAPING_TREE, grace_seconds=0.5)
        attempt.wait_for_line("ready")
        pids = [int(line) for line in attempt.journal.read_text().split()]
        assert len(pids) == 5
        assert all(psutil.pid_exists(pid) for pid in pids)

        client.request_stop(attempt.folder, "cancel")
        record = attempt.wait_for_end()

        assert record.unkillable == 0
        assert all_gone(pids)
        assert attempt.survivors() == []

    def test_wakes_stopped_process_for_its_term(self, attempt: Attempt) -> None:
        attempt.start(SLEEP, grace_seconds=3600)
        attempt.wait_for_line("ready")
        attempt.stage().suspend()

        client.request_stop(attempt.folder, "cancel")

        assert attempt.wait_for_end().signal == signal.SIGTERM

    def test_before_start_means_that_nothing_runs(self, attempt: Attempt) -> None:
        attempt.prepare(RUN_AND_SLEEP)

        client.request_stop(attempt.folder, "cancel")
        client.start(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, record.stop_reason, record.started_at) == (ExitWhy.STOPPED, "cancel", None)
        assert attempt.runs() == 0

    def test_works_by_hand_with_an_empty_file(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")

        (attempt.folder / "stop").touch()

        assert attempt.wait_for_end().stop_reason == "stop"

    def test_follows_from_term_to_the_supervisor(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")

        attempt.supervisor().terminate()

        assert attempt.wait_for_end().stop_reason == "supervisor_terminated"

    @pytest.mark.parametrize("script", [SLEEP, LEAVES_IN_ORDER])
    def test_of_the_machine_may_end_the_stage_before_the_supervisor_hears_of_it(
        self, attempt: Attempt, script: str
    ) -> None:
        attempt.start(script)
        attempt.wait_for_line("ready")

        supervisor, reaper = attempt.supervisor(), attempt.reaper()
        supervisor.suspend()
        attempt.stage().terminate()
        wait_until(lambda: reaper.status() == psutil.STATUS_ZOMBIE, "the reaper's report")
        supervisor.terminate()
        supervisor.resume()

        record = attempt.wait_for_end()
        assert (record.why, record.stop_reason) == (ExitWhy.STOPPED, "supervisor_terminated")

    def test_after_the_end_changes_nothing(self, attempt: Attempt) -> None:
        attempt.start("")
        record = attempt.wait_for_end()

        client.request_stop(attempt.folder, "cancel")
        client.start(attempt.folder)
        client.adopt(attempt.folder)

        assert attempt.supervise().wait() == 0
        assert attempt.observe().exit == record


class TestNothingIsLeft:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_killing_the_recorded_pid_ends_the_tree(self, attempt: Attempt, number: signal.Signals) -> None:
        attempt.start(ESCAPING_TREE, grace_seconds=0.5)
        attempt.wait_for_line("ready")

        attempt.stage().send_signal(number)
        record = attempt.wait_for_end()

        assert (record.why, record.signal, record.unkillable) == (ExitWhy.EXITED, number, 0)
        assert record.leftovers == 4
        assert all_gone(int(pid) for pid in attempt.journal.read_text().split())

    def test_what_a_script_left_running_is_named_without_its_options(self, attempt: Attempt, tmp_path: Path) -> None:
        events = tmp_path / "events.jsonl"
        left = ["/bin/sh", "-c", "sleep 1000; : --key=secret"]
        attempt.start(
            f"import subprocess\nsubprocess.Popen({left}, start_new_session=True)",
            env={"PATH": os.environ["PATH"], "DEEPE_EVENTS": str(events)},
        )

        record = attempt.wait_for_end()
        note = json.loads(events.read_text())

        assert (record.code, record.leftovers, note["type"]) == (0, 2, "note")
        assert note["message"].endswith(" were ended: sh, sleep 1000")

    def test_helpers_that_end_by_themselves_are_no_leftovers(self, attempt: Attempt) -> None:
        attempt.start("import subprocess\nsubprocess.Popen(['cat'], stdin=subprocess.PIPE)")

        record = attempt.wait_for_end()

        assert (record.code, record.leftovers) == (0, 0)

    def test_script_that_kills_its_own_group_is_recorded(self, attempt: Attempt) -> None:
        attempt.start("import os, signal\nos.killpg(0, signal.SIGKILL)")

        record = attempt.wait_for_end()

        assert (record.why, record.signal) == (ExitWhy.EXITED, signal.SIGKILL)


class TestKilledSupervisor:
    def test_adopter_delivers_exit_code(self, attempt: Attempt) -> None:
        attempt.start(UNTIL_TOLD)
        attempt.wait_for_line("ready")
        kill(attempt.supervisor())
        wait_until(lambda: not attempt.observe().supervised, "free lock")
        assert attempt.observe().phase is AttemptPhase.RUNNING

        client.adopt(attempt.folder)
        wait_until(lambda: attempt.observe().supervised, "adoption")
        attempt.journal.with_name(attempt.journal.name + ".go").touch()
        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.EXITED, 7)
        assert record.max_rss_bytes is not None
        assert attempt.runs() == 1

    def test_adopter_delivers_exit_code_of_a_stage_that_ended_unwatched(self, attempt: Attempt) -> None:
        attempt.start(UNTIL_TOLD)
        attempt.wait_for_line("ready")
        stage, reaper = attempt.stage(), attempt.reaper()
        kill(attempt.supervisor())
        attempt.journal.with_name(attempt.journal.name + ".go").touch()
        wait_until(lambda: all_gone([stage.pid, reaper.pid]), "the stage's end")

        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.EXITED, 7)

    def test_adopter_can_stop_the_whole_tree(self, attempt: Attempt) -> None:
        attempt.start(ESCAPING_TREE, grace_seconds=0.3)
        attempt.wait_for_line("ready")
        kill(attempt.supervisor())

        client.request_stop(attempt.folder, "cancel")
        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, record.stop_reason, record.unkillable) == (ExitWhy.STOPPED, "cancel", 0)
        assert all_gone(int(pid) for pid in attempt.journal.read_text().split())

    def test_adopter_knows_that_the_dead_supervisor_was_stopping(self, attempt: Attempt) -> None:
        attempt.start(
            "import os, signal, sys, time\n"
            "def on_term(*_):\n"
            "    print('told')\n"
            "    while not os.path.exists(JOURNAL + '.go'): time.sleep(0.01)\n"
            "    sys.exit(3)\n"
            "signal.signal(signal.SIGTERM, on_term)\n" + SLEEP,
            grace_seconds=3600,
        )
        attempt.wait_for_line("ready")
        stage, reaper = attempt.stage(), attempt.reaper()
        client.request_stop(attempt.folder, "cancel")
        attempt.wait_for_line("told")
        kill(attempt.supervisor())
        attempt.journal.with_name(attempt.journal.name + ".go").touch()
        wait_until(lambda: all_gone([stage.pid, reaper.pid]), "the stage's end")

        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, record.code, record.stop_reason) == (ExitWhy.STOPPED, 3, "cancel")

    def test_unknown_exit_is_lost_never_success(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")
        stage = attempt.stage()
        for process in (attempt.supervisor(), attempt.reaper(), stage):
            kill(process)

        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, record.code, record.signal) == (ExitWhy.LOST, None, None)

    @linux_only
    def test_killed_reaper_does_not_hide_the_exit_code(self, attempt: Attempt) -> None:
        attempt.start(UNTIL_TOLD)
        attempt.wait_for_line("ready")

        kill(attempt.reaper())
        attempt.journal.with_name(attempt.journal.name + ".go").touch()
        record = attempt.wait_for_end()

        assert (record.why, record.code) == (ExitWhy.EXITED, 7)

    def test_reboot_is_told_from_loss(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")
        for process in (attempt.supervisor(), attempt.reaper(), attempt.stage()):
            kill(process)
        change(attempt.folder / "state.json", boot_id="another boot")

        client.adopt(attempt.folder)

        assert attempt.wait_for_end().why is ExitWhy.REBOOT

    def test_stranger_with_the_stages_pid_is_neither_watched_nor_killed(self, attempt: Attempt, make: Maker) -> None:
        stranger = make()
        stranger.start(SLEEP)
        stranger.wait_for_line("ready")
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")
        for process in (attempt.supervisor(), attempt.reaper(), attempt.stage()):
            kill(process)
        change(attempt.folder / "state.json", pid=stranger.stage().pid)

        client.request_stop(attempt.folder, "cancel")
        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert record.code is None
        assert stranger.observe().exit is None
        assert stranger.stage().is_running()


class TestAtMostOnce:
    def test_four_supervisors_at_once_run_it_once(self, attempt: Attempt) -> None:
        attempt.prepare(UNTIL_TOLD)

        supervisors = [attempt.supervise() for _ in range(4)]
        attempt.wait_for_line("ready")
        wait_until(lambda: sum(s.poll() is None for s in supervisors) == 1, "three to give up")
        attempt.journal.with_name(attempt.journal.name + ".go").touch()
        codes = sorted(s.wait() for s in supervisors)

        assert codes == [0, 75, 75, 75]
        assert attempt.runs() == 1

    def test_second_start_after_a_crash_does_not_run_it_again(self, attempt: Attempt) -> None:
        attempt.start(RUN_AND_SLEEP)
        attempt.wait_for_line("ready")
        for process in (attempt.supervisor(), attempt.reaper(), attempt.stage()):
            kill(process)

        assert attempt.supervise().wait() == 76
        assert attempt.runs() == 1

    @pytest.mark.parametrize(
        ("point", "runs", "why"),
        [
            ("started", 0, ExitWhy.NEVER_STARTED),
            ("before-fork", 0, ExitWhy.NEVER_STARTED),
            ("before-record", 0, ExitWhy.NEVER_STARTED),
            ("before-release", 0, ExitWhy.NEVER_STARTED),
            ("after-release", 1, ExitWhy.EXITED),
            ("exit-seen", 1, ExitWhy.EXITED),
            ("before-exit", 1, ExitWhy.EXITED),
            ("after-exit", 1, ExitWhy.EXITED),
        ],
    )
    def test_crash_of_the_supervisor_at_any_point_runs_it_once_or_never(
        self, attempt: Attempt, point: str, runs: int, why: ExitWhy
    ) -> None:
        attempt.prepare("open(JOURNAL, 'a').write('run\\n')\nraise SystemExit(7)")
        assert attempt.supervise(fault_point=point).wait() == -signal.SIGKILL

        client.start(attempt.folder)
        client.adopt(attempt.folder)
        wait_until(lambda: not attempt.observe().supervised or attempt.observe().exit is not None, "the starter's end")
        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, attempt.runs()) == (why, runs)
        assert record.code == (7 if runs else None)

    def test_adopting_what_never_started_bars_it_for_ever(self, attempt: Attempt) -> None:
        attempt.prepare(RUN_AND_SLEEP)

        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert (record.why, record.started_at) == (ExitWhy.NEVER_STARTED, None)
        assert attempt.supervise().wait() == 0
        assert attempt.runs() == 0

    def test_incomplete_spec_ends_with_a_reason(self, attempt: Attempt) -> None:
        attempt.prepare(RUN_AND_SLEEP)
        (attempt.folder / "spec.json").write_text('{"attempt_id": "x"}')

        assert attempt.supervise().wait() == 0

        record = attempt.wait_for_end()
        assert record.why is ExitWhy.SPAWN_FAILED
        assert "argv" in str(record.error)


@linux_only
class TestFullDisk:
    def test_keeps_stage_and_exit_code_until_disk_has_room(self, attempt: Attempt) -> None:
        attempt.start(UNTIL_TOLD)
        attempt.wait_for_line("ready")
        owners = (attempt.supervisor(), attempt.reaper())
        stage = attempt.stage()
        for owner in owners:
            resource.prlimit(owner.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

        attempt.journal.with_name(attempt.journal.name + ".go").touch()
        wait_until(lambda: is_gone(stage.pid), "the stage's end")
        wait_until(lambda: any(attempt.folder.glob(".exit.json.*")), "the first try to record it")
        held = attempt.observe()
        resource.prlimit(owners[0].pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        record = attempt.wait_for_end()

        assert (held.supervised, held.exit) == (True, None)
        assert (record.why, record.code) == (ExitWhy.EXITED, 7)


class TestFolderGone:
    def test_supervisor_ends_with_its_stage_when_nobody_can_read_the_end(self, attempt: Attempt) -> None:
        attempt.start(UNTIL_TOLD)
        attempt.wait_for_line("ready")
        supervisor = attempt.supervisor()

        shutil.rmtree(attempt.folder)
        attempt.journal.with_name(attempt.journal.name + ".go").touch()

        wait_until(lambda: is_gone(supervisor.pid), "the supervisor's end")


class TestIdle:
    def test_costs_next_to_nothing(self, attempt: Attempt) -> None:
        attempt.start(SLEEP)
        attempt.wait_for_line("ready")
        supervisor = attempt.supervisor()
        before = supervisor.cpu_times()

        beat = attempt.observe().heartbeat_at
        wait_until(lambda: attempt.observe().heartbeat_at != beat, "a heartbeat")
        after = supervisor.cpu_times()

        assert (after.user + after.system) - (before.user + before.system) <= 0.1
        assert supervisor.memory_info().rss < 40 * 1024 * 1024


# The stage and four that try to stay: an own session, one that ignores TERM, a double fork, one without our variable.
ESCAPING_TREE = """
import os, signal, subprocess, sys, time
def note(): open(JOURNAL, 'a').write(f'{os.getpid()}\\n')
def sleeper(*, new_session=False, ignore_term=False, twice=False, no_environment=False):
    code = 'import os, signal, sys, time\\n'
    if ignore_term: code += 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n'
    if twice: code += 'if os.fork(): os._exit(0)\\nos.setsid()\\n'
    code += f'open({JOURNAL!r}, "a").write(f"{os.getpid()}\\\\n")\\ntime.sleep(60)'
    subprocess.Popen([sys.executable, '-c', code], start_new_session=new_session, env={} if no_environment else None)
note()
sleeper(new_session=True)
sleeper(ignore_term=True)
sleeper(twice=True)
sleeper(new_session=True, no_environment=True)
while open(JOURNAL).read().count('\\n') < 5: time.sleep(0.01)
print('ready')
time.sleep(60)
"""


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(process.pid), f"death of {process}")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
