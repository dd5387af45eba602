"""What the agent does with accelerators: quarantine until the proof, early release while an end is written."""

import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from app.domain.enums import JobStatus
from app.executor.nodes import agent as agent_module
from app.store import job_attempts, job_status, leases
from tests import job_rows
from tests.executor.test_agent import Bench, is_finalizing
from tests.waiting import until


@pytest.fixture
async def bench(tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(agent_module, "QUARANTINE_SECONDS", 0.05)
    monkeypatch.setattr(agent_module, "LONG_FINALIZING_SECONDS", 0.05)
    bench = Bench(tmp_path, sqlite_url)
    bench.reporter.accelerators = job_rows.cards(1)
    bench.node_id = await job_rows.add_node(bench.plain, accelerators=bench.reporter.accelerators)
    yield bench
    await bench.database.close()
    await bench.plain.close()


async def test_accelerator_comes_back_once_the_processes_are_gone(bench: Bench) -> None:
    await job_rows.add_job(bench.plain)
    won = await job_rows.claim(bench.plain, bench.node_id)
    assert won is not None
    async with bench.plain.writing() as session:
        await job_attempts.finish(session, won, replace(job_rows.FAILURE, exit={"unkillable": 1}), now=job_rows.START)
    waiting = await job_rows.add_job(bench.plain)
    survivor = survivor_of(won.attempt.id)

    try:
        async with bench.running():
            reads = bench.database.reads

            async def looked_often() -> bool:
                return bench.database.reads > reads + 8

            await until(looked_often, "looks at the quarantine")
            assert await bench.status(waiting) is JobStatus.QUEUED
            survivor.kill()
            survivor.wait()
            await bench.reaches(waiting, JobStatus.SUCCEEDED)
    finally:
        survivor.kill()
        survivor.wait()


async def test_next_job_starts_while_the_end_of_the_last_is_written(bench: Bench) -> None:
    """Weights of a large model are hashed for many minutes; nothing of the attempt is left to use the accelerator."""
    first, second = await job_rows.add_job(bench.plain), await job_rows.add_job(bench.plain)
    bench.finalizer.allowed.clear()

    async with bench.running():
        await bench.reaches(first, JobStatus.RUNNING)
        await until(is_finalizing, "the finalizing")
        await bench.reaches(second, JobStatus.RUNNING)
        bench.finalizer.allowed.set()
        for job_id in (first, second):
            await bench.reaches(job_id, JobStatus.SUCCEEDED)


async def test_accelerators_bound_jobs_and_slots_do_not(bench: Bench) -> None:
    bench.launcher.script = "sleep 60"
    moments = [job_rows.START + timedelta(seconds=number) for number in range(3)]
    jobs = [await job_rows.add_job(bench.plain, created_at=moment) for moment in moments]

    async with bench.running():
        await bench.reaches(jobs[0], JobStatus.RUNNING)
        assert [await bench.status(job_id) for job_id in jobs[1:]] == [JobStatus.QUEUED] * 2
        async with bench.plain.reading() as session:
            held = await leases.held(session, [bench.node_id])
        assert list(held[bench.node_id]) == ["card-0"]
        for job_id in jobs:
            async with bench.plain.writing() as session:
                await job_status.request_cancel(session, job_id, now=job_rows.START)
        await bench.reaches(jobs[0], JobStatus.SUCCEEDED)


def survivor_of(attempt_id: str) -> "subprocess.Popen[bytes]":
    """Start a process as one that could not be killed leaves it behind."""
    return subprocess.Popen(["sleep", "60"], env={"PATH": "/usr/bin:/bin", "DEEPE_ATTEMPT": attempt_id})
