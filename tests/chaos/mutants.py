"""Mutants: the service with one of its safeguards taken out. Each must be noticed by the tests that are named for it.

    python -m tests.chaos.mutants [NAME ...]

A mutant is a copy of the tree with one small change. The tests that should notice run on it, the first that does ends
it. Before them the same tests run on an unchanged copy. Exit status 1 if a mutant lived, or if the tests cannot run.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("app", "migrations", "tests", "pyproject.toml")
AT_ONCE = 2
SECONDS = 1800
WAIT_SECONDS = 90  # many a mutant is noticed because its test waits in vain

SUPERVISOR = "tests/executor/test_supervisor.py"
SUPERVISION = "tests/executor/test_supervision.py"
STORE = "tests/store/test_jobs.py"
SURVIVAL = "tests/worker/test_survival.py"
SILENCE = "tests/chaos/test_silence.py"
POINTS = "tests/chaos/test_crash_points.py"
MACHINE = "tests/chaos/test_machine.py"
DEAD_NODES = "tests/worker/test_dead_nodes.py"


@dataclass(frozen=True)
class Change:
    """Text of one file that stands there once, and what stands there instead."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A safeguard that is missing, and the tests that must notice."""

    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]


def _mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, (Change(file, old, new),), tests)


_KEEPER = "app/executor/supervisor/program.py"
_AGENT = "app/executor/nodes/agent.py"
_FOLDERS = "app/executor/nodes/orphans.py"
_STATUS = "app/store/job_status.py"
_TABLES = "app/store/tables.py"
_FIRST_SCHEMA = "migrations/versions/0001_create_the_tables.py"

MUTANTS = (
    _mutant(
        "lock removed",
        _KEEPER,
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        f"{SUPERVISOR}::TestAtMostOnce::test_four_supervisors_at_once_run_it_once",
    ),
    _mutant(
        "`started` removed",
        _KEEPER,
        'first = folder.create_once("started")',
        "first = True",
        f"{SUPERVISOR}::TestAtMostOnce::test_second_start_after_a_crash_does_not_run_it_again",
    ),
    _mutant(
        "released before it is recorded",
        _KEEPER,
        '        fault_point("before-record")\n',
        '        os.write(release.pipe, release.word)\n        fault_point("before-record")\n',
        f"{SUPERVISOR}::TestAtMostOnce::test_crash_of_the_supervisor_at_any_point_runs_it_once_or_never",
    ),
    _mutant(
        "adopter starts it again",
        _KEEPER,
        "        supervisor.adopt(never_ran=first)\n",
        "        supervisor.run()\n",
        f"{SUPERVISOR}::TestKilledSupervisor::test_adopter_delivers_exit_code",
    ),
    _mutant(
        "unknown exit is success",
        _KEEPER,
        'or {"released": True, "lost": True}\n\n    def _watch_foreign',
        'or {"released": True, "code": 0}\n\n    def _watch_foreign',
        f"{SUPERVISOR}::TestKilledSupervisor::test_unknown_exit_is_lost_never_success",
    ),
    _mutant(
        "end recorded without a sweep",
        _KEEPER,
        "leftovers, unkillable = self._sweep()",
        "leftovers, unkillable = 0, 0",
        f"{SUPERVISOR}::TestNothingIsLeft::test_killing_the_recorded_pid_ends_the_tree",
    ),
    _mutant(
        "cancel reaches the script's own process only",
        _KEEPER,
        "return tree_of(self.state, own_pids=own_pids, marker=f\"DEEPE_ATTEMPT={self.state['attempt_id']}\")",
        'return [one for one in [read_process(self.state["pid"])] if one is not None and not one.zombie and own_pids]',
        f"{SUPERVISOR}::TestStop::test_ends_whole_tree_whatever_its_children_do",
    ),
    _mutant(
        "pid alone is an identity",
        _KEEPER,
        'return row is not None and row.start == identity["start"]',
        "return row is not None and bool(identity)",
        f"{SUPERVISOR}::TestKilledSupervisor::test_stranger_with_the_stages_pid_is_neither_watched_nor_killed",
        f"{MACHINE}::TestPids",
    ),
    _mutant(
        "boot id ignored",
        _KEEPER,
        'if self.state["boot_id"] != boot_id():',
        'if self.state["boot_id"] == "":',
        f"{SUPERVISOR}::TestKilledSupervisor::test_reboot_is_told_from_loss",
    ),
    _mutant(
        "files written in place",
        _KEEPER,
        '        temporary = self.file(f".{name}.{os.getpid()}")\n',
        "        temporary = self.file(name)\n",
        f"{MACHINE}::TestDisk::test_that_is_read_while_it_is_written_shows_whole_files_only",
    ),
    _mutant(
        "reaper keeps nothing",
        _KEEPER,
        "            folder.write(REAPER_FILE, ending)\n",
        "",
        f"{SUPERVISOR}::TestKilledSupervisor::test_adopter_delivers_exit_code_of_a_stage_that_ended_unwatched",
    ),
    _mutant(
        "lost state means never started",
        _KEEPER,
        'found, left = (0, 0) if never_ran else end_strays(str(self.spec.get("attempt_id")))',
        "strays = Strays(0, 0)",
        f"{MACHINE}::TestDisk::test_that_loses_the_state_of_a_running_script_is_no_reason_to_run_it_again",
    ),
    _mutant(
        "dead supervisor is a dead attempt",
        "app/executor/attempts/reconcile.py",
        "        return Step.ADOPT\n",
        "        return Step.END_LOST\n",
        f"{SURVIVAL}::TestWorkerIsKilled::test_supervisor_alone_while_the_worker_watches",
        "tests/executor/test_reconcile.py",
    ),
    _mutant(
        "lost folder is launched again",
        "app/executor/attempts/reconcile.py",
        "        return Step.END_LOST\n    return",
        "        return Step.LAUNCH\n    return",
        f"{SURVIVAL}::TestClaimWithoutLaunch::test_running_row_whose_folder_is_gone_is_lost_not_repeated",
        f"{MACHINE}::TestDisk::test_that_loses_the_folder_of_a_running_attempt_ends_it_and_what_runs",
    ),
    _mutant(
        "lost folder is no reason to look for processes",
        "app/executor/engines/local.py",
        "return Strays(*await asyncio.to_thread(program.end_strays, attempt_id))",
        "return Strays(0, 0)",
        f"{MACHINE}::TestDisk::test_that_loses_the_folder_of_a_running_attempt_ends_it_and_what_runs",
    ),
    _mutant(
        "visibility timeout of 0.2 s",
        _AGENT,
        "        await self._advance_all(live)\n",
        "        for old in live:\n"
        "            async with self._database.writing() as session:\n"
        "                now = await database_now(session)\n"
        "                if (now - old.attempt.created_at).total_seconds() > 0.2:\n"
        "                    from app.domain.retries import Again\n"
        "                    again = Again(charged=False, delay=timedelta())\n"
        "                    await store.requeue(\n"
        "                        session, old, reason=EndReason.NODE_LOST, now=now, again=again, params={}\n"
        "                    )\n"
        "        await self._advance_all(live)\n",
        f"{SILENCE}::TestFrozenWorker::test_that_resumes_after_its_lease_changes_nothing",
    ),
    _mutant(
        "missing heartbeat puts the job back",
        _AGENT,
        "            await job_attempts.renew_leases(session, self._node_id, now=now, lease=self._timing.lease)\n",
        "            await job_attempts.renew_leases(session, self._node_id, now=now, lease=self._timing.lease)\n"
        "            import sqlalchemy as sa\n"
        "            from sqlmodel import col, select\n"
        "            from app.store.tables import AttemptRow, JobRow\n"
        "            silent = select(AttemptRow.job_id).where(AttemptRow.live, AttemptRow.lease_expires_at < now)\n"
        "            late = (await session.exec(silent)).all()\n"
        "            over = sa.update(AttemptRow).where(col(AttemptRow.job_id).in_(late))\n"
        "            await session.exec(over.values(live=False))\n"
        "            await session.exec(sa.update(JobRow).where(col(JobRow.id).in_(late)).values(status='queued'))\n",
        f"{SILENCE}::TestFrozenWorker::test_that_resumes_after_its_lease_changes_nothing",
    ),
    _mutant(
        "orphans are left alone",
        _FOLDERS,
        '            await self._engine.stop(attempt_id, "orphan")\n',
        "",
        f"{SURVIVAL}::TestOrphans",
    ),
    _mutant(
        "orphan without a supervisor is taken for dead",
        _FOLDERS,
        "state.supervised or state.phase in (AttemptPhase.STARTED, AttemptPhase.RUNNING)",
        "observation.supervised",
        f"{MACHINE}::TestRestoredDatabase",
    ),
    _mutant(
        "leases released before the tree is empty",
        _AGENT,
        '        fault_point("stop-asked")\n',
        '        fault_point("stop-asked")\n'
        "        async with self._database.writing() as session:\n"
        "            now = await database_now(session)\n"
        "            await leases.end_of_attempt(session, claim.attempt.id, proven_empty=True, now=now)\n",
        f"{MACHINE}::TestLease",
    ),
    _mutant(
        "lease of an attempt that could not be ended is released",
        _STATUS,
        'return not exit_record.get("unkillable")',
        "return True",
        "tests/store/test_leases.py",
    ),
    _mutant(
        "the queue is the truth, nobody looks in the database",
        _AGENT,
        "deadline = self._monotonic() + self._timing.poll_seconds",
        "deadline = self._monotonic() + 1e9",
        f"{SILENCE}::TestLostNotification",
    ),
    _mutant(
        "token not checked",
        _STATUS,
        "        conditions.append(JOB.c.token == token)\n",
        "        pass\n",
        f"{STORE}::TestNodeWrites::test_stale_token_changes_nothing",
    ),
    _mutant(
        "end written over an end",
        _STATUS,
        "statement = sa.update(JOB).where(JOB.c.id.in_(job_ids), JOB.c.status.in_(old), *conditions)",
        "statement = sa.update(JOB).where(JOB.c.id.in_(job_ids), *conditions)",
        f"{STORE}::TestNodeWrites",
        f"{STORE}::TestClaim::test_two_sessions_that_race_for_a_job_do_not_both_win",
    ),
    Mutant(
        "unique index of live attempts dropped",
        (
            Change(
                _TABLES,
                '"uq_attempt_job_id_live", "job_id", unique=True)',
                '"uq_attempt_job_id_live", "job_id")',
            ),
            Change(
                _FIRST_SCHEMA,
                '"uq_attempt_job_id_live",\n            ["job_id"],\n            unique=True,',
                '"uq_attempt_job_id_live",\n            ["job_id"],\n            unique=False,',
            ),
        ),
        (f"{STORE}::TestClaim::test_second_live_attempt_is_impossible",),
    ),
    _mutant(
        "success is exit code 0",
        "app/executor/attempts/results.py",
        "        return _failed(_plain(problem.reason, problem.detail), result=result)\n",
        "        return Verdict(succeeded=bool(problem), reason=EndReason.COMPLETED, result=result)\n",
        "tests/executor/test_results.py::TestJudgeTraining",
    ),
    _mutant(
        "stale end makes a model",
        "app/executor/attempts/finalize.py",
        "                    raise _ClaimLost  # rolls the model back\n",
        "                    pass\n",
        "tests/executor/test_finalize.py::TestFinalize",
    ),
    _mutant(
        "accepted before the commit",
        "app/api/dependencies.py",
        'Depends(_writing, scope="function")',
        "Depends(_writing)",
        "tests/chaos/test_submit.py",
    ),
    _mutant(
        "second worker of a node",
        "app/executor/nodes/node_lock.py",
        "                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        "tests/executor/test_agent.py::TestNothingRunsTwice::test_second_agent_of_a_node_is_refused",
    ),
    _mutant(
        "dead node returns before its orphans have ended",
        _AGENT,
        "if status in GONE_STATUSES and not self._orphans.exist:",
        "if status in GONE_STATUSES:",
        f"{DEAD_NODES}::TestDeclaredDead::test_zombie_is_stopped_and_the_other_attempt_counts",
    ),
    _mutant(
        "jobs begin beside orphans",
        _AGENT,
        "if status is not NodeStatus.READY or self._orphans.exist:",
        "if status is not NodeStatus.READY:",
        f"{DEAD_NODES}::TestIdentity::test_node_that_joins_anew_ends_what_its_home_still_runs_first",
    ),
    _mutant(
        "process that stood still starts what it claimed before",
        _AGENT,
        "if clock_since_boot() - self._heard_at > SURE_SECONDS:",
        "if False:",
        "tests/executor/test_agent.py::TestStoodStill",
    ),
    _mutant(
        "node declared dead while it beats",
        "app/executor/nodes/lost_nodes.py",
        "if age < NODE_SILENT_AFTER:",
        "if False:",
        "tests/api/test_nodes.py::TestDeclareDead::test_needs_its_name_and_its_silence",
    ),
)


@dataclass(frozen=True)
class Fate:
    """What became of a mutant: the test that noticed it, None if it lives; `trouble` if the tests did not run."""

    mutant: Mutant
    killer: str | None
    seconds: float
    trouble: str = ""


def main(names: Sequence[str]) -> int:
    """Run the mutants with these names, or all."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if unknown := {*names} - {mutant.name for mutant in chosen}:
        print(f"no such mutant: {', '.join(sorted(unknown))}")
        return 2
    control = test_copy((), sorted({test for mutant in chosen for test in mutant.tests}))
    if control.returncode:
        print(f"the tests fail without any mutant:\n{control.stdout[-4000:]}")
        return 2
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fates = list(pool.map(fate_of, chosen))
    print(table(fates))
    return 0 if all(fate.killer for fate in fates) else 1


def fate_of(mutant: Mutant) -> Fate:
    """Run the mutant's tests on it until one fails."""
    begun = time.monotonic()
    run = test_copy(mutant.changes, mutant.tests)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    trouble = "" if run.returncode in (0, 1) else run.stdout[-2000:] + run.stderr[-2000:]
    killer = failed.group(1) if failed and run.returncode == 1 else None
    return Fate(mutant, killer, time.monotonic() - begun, trouble)


def test_copy(changes: Iterable[Change], tests: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run the tests in a copy of the tree with these changes; stop at the first that fails."""
    with tempfile.TemporaryDirectory(prefix="deepe-mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
            else:
                shutil.copyfile(source, copy / name)
        for change in changes:
            apply(change, copy)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command += [f"--timeout={WAIT_SECONDS}", *tests]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=SECONDS, check=False)


def apply(change: Change, root: Path) -> None:
    """Change one file; the old text must stand there exactly once."""
    file = root / change.file
    text = file.read_text("utf-8")
    if text.count(change.old) != 1:
        raise ValueError(f"{change.file} has {text.count(change.old)} times: {change.old!r}")
    file.write_text(text.replace(change.old, change.new), "utf-8")


def table(fates: Sequence[Fate]) -> str:
    """Return who was noticed by what."""
    width = max(len(fate.mutant.name) for fate in fates)
    lines = [f"{fate.mutant.name:{width}}  {fate.killer or fate.trouble or 'LIVES'}" for fate in fates]
    killed = sum(fate.killer is not None for fate in fates)
    return "\n".join([*lines, f"killed {killed} of {len(fates)}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
