"""What the machine does to a job: its clock jumps, its disk fills, its memory ends, files go, pids come again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from app.domain.enums import EndReason, JobStatus
from app.executor.attempts.classification import classify
from app.executor.supervisor import client, program
from app.executor.supervisor.client import ExitWhy
from app.store.tables import AttemptRow, JobRow
from tests.chaos.evidence import collect
from tests.chaos.stage import JOURNAL, SCRIPT
from tests.chaos.verdict import Evidence, judge
from tests.executor.attempts import Attempt, attempts
from tests.waiting import until, wait_until
from tests.worker.harness import ROOT, Site, kill

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# What makes the wall clock of a process that of a file, whatever it is by then.
SKEW = """
import time
real = time.time
def skewed():
    with open({offset!r}) as file:
        return real() + float(file.read())
time.time = skewed
"""
SKEWED_SUPERVISOR = SKEW + "exec(compile(open({supervisor!r}).read(), {supervisor!r}, 'exec'))\n"
SKEWED_WORKER = (
    SKEW
    + """
import runpy
from app.executor.supervisor import program
program.__file__ = {wrapper!r}
runpy.run_module("app.worker", run_name="__main__", alter_sys=True)
"""
)
WRITE_FOR_EVER = """
import sys
from app.executor.supervisor.program import Folder
folder = Folder(sys.argv[1])
while True:
    folder.write("state.json", {"words": ["word"] * 20000}, durable=False)
"""
RUN_AND_SLEEP = "import time\nopen(JOURNAL, 'a').write('run\\n')\nprint('ready', flush=True)\ntime.sleep(60)"


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    """Return an attempt folder of its own."""
    for make in attempts(tmp_path):
        yield make()


async def evidence_of(site: Site, *jobs: str) -> Evidence:
    return await collect(site.database, journal=site.root / JOURNAL, acknowledged=jobs)


async def wait_for_line(site: Site, job: str, word: str) -> None:
    """Wait until the job's script wrote this word into the journal."""

    async def look() -> bool:
        return any(line.job == job and line.word == word for line in (await evidence_of(site)).journal)

    await until(look, f"{word} of {job}", report=site.report)


class TestClock:
    async def test_that_jumps_by_an_hour_both_ways_changes_no_outcome(self, site: Site, tmp_path: Path) -> None:
        offset, wrapper, worker_file = (tmp_path / name for name in ("offset", "supervisor.py", "worker.py"))
        offset.write_text("0")
        values = {"offset": str(offset), "supervisor": program.__file__, "wrapper": str(wrapper)}
        wrapper.write_text(SKEWED_SUPERVISOR.format(**values))
        worker_file.write_text(SKEWED_WORKER.format(**values))
        worker = site.start_worker(command=(sys.executable, str(worker_file)), DEEPE_SLOTS="4")

        jobs = []
        for seconds in ("3600", "-3600", "0"):
            jobs.append(await site.submit(SCRIPT, parameters={"ticks": 5, "gate": "go", "family": "stubborn"}))
            await site.wait(jobs[-1], JobStatus.RUNNING)
            set_atomically(offset, seconds)
        stopped = await site.submit(SCRIPT, parameters={"ticks": 100_000})
        await wait_for_line(site, stopped, "start")
        await site.cancel(stopped)
        set_atomically(offset, "3600")
        (site.root / "go").touch()
        rows = await site.wait_for_end(*jobs, stopped)

        assert [row.status for row in rows] == [*[JobStatus.SUCCEEDED] * 3, JobStatus.CANCELLED], site.report()
        evidence = await collect(
            site.database,
            journal=site.root / JOURNAL,
            acknowledged=[*jobs, stopped],
            cancelled=frozenset({stopped}),
        )
        assert judge(evidence).violations() == {}
        assert {row.attempts for row in rows} == {1}
        assert "Traceback" not in worker.log


class TestDisk:
    @linux_only
    async def test_full_keeps_script_and_end_until_there_is_room(self, site: Site) -> None:
        """A job that comes meanwhile is refused with the reason."""
        root = site.node_home().root
        with small_disk(root):
            job = await site.submit(SCRIPT, parameters={"ticks": 5, "gate": "go"})
            site.start_worker(DEEPE_SLOTS="2", DEEPE_MIN_FREE_BYTES="0")
            await site.wait(job, JobStatus.RUNNING)

            fill(root / "ballast")
            late = await site.submit(SCRIPT, parameters={"ticks": 1})
            refused = await site.wait(late)
            (site.root / "go").touch()
            await wait_for_line(site, job, "end")
            meanwhile = await site.row(job)
            (root / "ballast").unlink()
            row = await site.wait(job)

            assert (refused.status, refused.reason) == (JobStatus.FAILED, EndReason.DISK_FULL), site.story(refused)
            assert meanwhile.status is JobStatus.RUNNING
            assert (row.status, row.attempts) == (JobStatus.SUCCEEDED, 1), site.story(row)
            await site.close()

    @linux_only
    async def test_that_became_read_only_is_named_and_the_script_is_found_when_it_is_not(self, site: Site) -> None:
        root = site.node_home().root
        with small_disk(root):
            site.place_base()
            remount(root, "ro")
            refused = site.start_bare_worker()
            assert refused.process.wait() == 2
            remount(root, "rw")
            job = await site.submit(SCRIPT, parameters={"ticks": 3})
            site.start_bare_worker(DEEPE_MIN_FREE_BYTES="0")
            row = await site.wait(job)
            await site.close()

        assert "DEEPE_NODE_HOME" in refused.log
        assert "Traceback" not in refused.log
        assert row.status is JobStatus.SUCCEEDED

    async def test_that_loses_the_folder_of_a_running_attempt_ends_it_and_what_runs(self, site: Site) -> None:
        job = await site.submit(SCRIPT, parameters={"ticks": 100_000, "family": "session"})
        worker = site.start_worker()
        await wait_for_line(site, job, "child")
        await site.wait(job, JobStatus.RUNNING)
        (attempt,) = await site.attempts(job)

        shutil.rmtree(site.node_home().attempts / attempt.id)
        row = await site.wait(job)

        assert (row.status, row.reason, row.attempts) == (JobStatus.FAILED, EndReason.SUPERVISOR_LOST, 1)
        assert judge(await evidence_of(site, job)).ran_after_end == ()
        assert worker.events("folder_lost")[0]["unkillable"] == 0
        await until(lambda: nothing_runs(site), "the end of the supervisor", report=site.report)

    def test_that_is_read_while_it_is_written_shows_whole_files_only(self, tmp_path: Path) -> None:
        """Also when the writer is killed in the middle."""
        (tmp_path / "state.json").write_text('{"words": []}')
        for _ in range(5):
            writer = subprocess.Popen(
                [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], env={"PYTHONPATH": str(ROOT)}
            )
            for _ in range(300):
                assert "words" in json.loads((tmp_path / "state.json").read_bytes())
                time.sleep(0.001)
            writer.kill()
            writer.wait()
            assert "words" in json.loads((tmp_path / "state.json").read_bytes())

    def test_that_loses_the_state_of_a_running_script_is_no_reason_to_run_it_again(self, attempt: Attempt) -> None:
        attempt.start(RUN_AND_SLEEP)
        attempt.wait_for_line("ready")
        stage = attempt.stage()
        kill(attempt.supervisor().pid)
        (attempt.folder / "state.json").write_text("")

        client.adopt(attempt.folder)
        record = attempt.wait_for_end()

        assert record.why is ExitWhy.LOST  # and not "never started", which would be tried again as harmless
        assert not stage.is_running()
        assert attempt.runs() == 1


class TestRestoredDatabase:
    async def test_script_that_nobody_knows_is_ended_although_its_supervisor_is_dead(self, site: Site) -> None:
        job = await site.submit(SCRIPT, parameters={"ticks": 100_000, "family": "orphan"})
        first = site.start_worker()
        await wait_for_line(site, job, "child")
        await site.wait(job, JobStatus.RUNNING)
        (attempt,) = await site.attempts(job)
        first.kill()
        folder = site.node_home().attempts / attempt.id
        state = json.loads((folder / "state.json").read_bytes())
        kill(state["supervisor_pid"])
        async with site.database.writing() as session:
            await session.exec(sa.update(AttemptRow).values(live=False))
            await session.exec(sa.update(JobRow).values(status=JobStatus.FAILED))

        worker = site.start_worker()
        await until(lambda: nothing_runs(site), "the end of the script", report=site.report)

        await until(lambda: is_gone(folder), "the folder's end", report=site.report)
        assert worker.events("orphan_stopped")


class TestLease:
    async def test_of_a_cancelled_job_ends_after_the_last_of_its_processes(self, any_site: Site) -> None:
        """The next job waits for the accelerator as long as something of the one before may use it."""
        first = await any_site.submit(SCRIPT, parameters={"ticks": 100_000, "family": "stubborn"})
        any_site.start_worker(DEEPE_SIMULATED_ACCELERATORS="1", DEEPE_SLOTS="2")
        await wait_for_line(any_site, first, "child")
        await any_site.wait(first, JobStatus.RUNNING)
        second = await any_site.submit(SCRIPT, parameters={"ticks": 3})

        await any_site.cancel(first)
        await any_site.wait_for_end(first, second)

        known = {"acknowledged": [first, second], "cancelled": frozenset({first})}
        evidence = await collect(any_site.database, journal=any_site.root / JOURNAL, **known)
        assert judge(evidence).violations() == {}
        assert {line.accelerators for line in evidence.journal} == {("simulated-0",)}
        assert len(evidence.leases) == 2


class TestMemory:
    @linux_only
    def test_that_ends_in_the_control_group_is_the_cause(self, attempt: Attempt) -> None:
        with small_memory(96 * 2**20) as join:
            attempt.prepare("open(JOURNAL, 'a').write('run\\n')\nblock = bytearray(400 * 2**20)\nprint(len(block))")
            parent = subprocess.Popen(
                [sys.executable, "-I", "-S", program.__file__, str(attempt.folder)], preexec_fn=join
            )
            record = attempt.wait_for_end()
            parent.wait()

        failure = classify(record, ())
        assert (record.signal, record.code) == (signal.SIGKILL, None)
        assert (record.oom_kills or 0) >= 1
        assert (failure.reason, failure.params["probable"]) == (EndReason.OUT_OF_MEMORY, False)
        assert attempt.runs() == 1


class TestPids:
    @linux_only
    def test_that_come_again_are_told_from_the_script(self, attempt: Attempt) -> None:
        attempt.start(RUN_AND_SLEEP)
        attempt.wait_for_line("ready")
        stage = attempt.stage()
        for process in (attempt.supervisor(), attempt.reaper(), stage):
            kill(process.pid)
        wait_until(lambda: not psutil.pid_exists(stage.pid), "the end of the script")

        with stranger_with(stage.pid) as stranger:
            client.request_stop(attempt.folder, "cancel")
            client.adopt(attempt.folder)
            record = attempt.wait_for_end()

            assert (record.why, record.code) in ((ExitWhy.LOST, None), (ExitWhy.STOPPED, None))
            assert stranger.poll() is None


# ---- what only some kernels let us do: elsewhere these tests are skipped --------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount two megabytes at the folder."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


@contextlib.contextmanager
def small_memory(limit: int) -> Iterator[Callable[[], object]]:
    """Make a control group of so many bytes; yield what a child calls to join it."""
    root = Path("/sys/fs/cgroup/memory")
    name, file = ("memory.limit_in_bytes", root) if root.is_dir() else ("memory.max", root.parent)
    group = file / f"deepe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        wait_until(lambda: _removed(group), "the end of the control group")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


@contextlib.contextmanager
def stranger_with(pid: int) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a process that gets this pid."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(300):
        try:
            last.write_text(str(pid - 1))
        except OSError as error:
            pytest.skip(f"pids cannot be chosen here: {error}")
        process = subprocess.Popen(["sleep", "60"])
        try:
            if process.pid == pid:
                yield process
                return
        finally:
            process.kill()
            process.wait()
    pytest.skip("the pid was always taken by others")


def set_atomically(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


async def is_gone(folder: Path) -> bool:
    return not folder.exists()


async def nothing_runs(site: Site) -> bool:
    return site.processes() == []
