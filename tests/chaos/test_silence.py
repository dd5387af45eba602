"""A node of which nothing is heard: its jobs go on, nobody else takes them, their ends are written when it is back."""

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from app.domain.enums import JobStatus
from app.store.clock import database_now
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import AttemptRow, NodeRow
from tests.chaos.evidence import collect
from tests.chaos.network import Link, ProxyLink, namespaces, namespaces_are_permitted
from tests.chaos.postgres import Postgres, own_postgres
from tests.chaos.proxy import Line, Proxy
from tests.chaos.stage import JOURNAL, SCRIPT
from tests.chaos.verdict import judge
from tests.waiting import until
from tests.worker.harness import Site

LINKS = ["silent", "cut", *(["namespace"] if namespaces_are_permitted() else [])]


@asynccontextmanager
async def links(kind: str, count: int, postgres: Postgres) -> AsyncIterator[list[tuple[Link, str]]]:
    """Yield ways to the database and the URL that each leads to."""
    with namespaces(count if kind == "namespace" else 0) as spaces:
        addresses = [space.address for space in spaces] or ["127.0.0.1"] * count
        proxies = [Proxy(postgres.port, listen=address) for address in addresses]
        for proxy in proxies:
            await proxy.start()
        ways: Sequence[Link] = spaces or [ProxyLink(proxy, Line(kind)) for proxy in proxies]
        yield [(way, postgres.url_by(proxy.port, way.address)) for way, proxy in zip(ways, proxies, strict=True)]
        for proxy in proxies:
            await proxy.close()


async def let_an_hour_pass(database: Database) -> None:
    """Make every lease and heartbeat an hour older, as a long silence would."""
    async with database.writing() as session:
        past = await database_now(session) - timedelta(hours=1)
        await session.exec(sa.update(AttemptRow).values(lease_expires_at=past))
        await session.exec(sa.update(NodeRow).values(heartbeat_at=past))


async def node_of(site: Site, job: str) -> str:
    """Return the name of the node that runs the job."""
    async with site.database.reading() as session:
        statement = select(NodeRow.name).join(AttemptRow, col(AttemptRow.node_id) == col(NodeRow.id))
        return (await session.exec(statement.where(AttemptRow.job_id == job))).one()


def ended(site: Site, job: str) -> bool:
    """Say whether the job's script has done all it does."""
    file = site.root / JOURNAL
    return any(job in line and '"end"' in line for line in file.read_text().splitlines()) if file.exists() else False


async def check(site: Site, *jobs: str) -> None:
    """Demand a clean verdict, and that each job ran once and succeeded."""
    evidence = await collect(site.database, journal=site.root / JOURNAL, acknowledged=jobs)
    assert judge(evidence).violations() == {}, site.report()
    assert sorted(line.job for line in evidence.journal if line.word == "start") == sorted(jobs)
    assert {job.status for job in evidence.jobs} == {JobStatus.SUCCEEDED}
    assert len(evidence.attempts) == len(jobs)


class TestPartition:
    @pytest.mark.postgres
    @pytest.mark.parametrize("kind", LINKS)
    async def test_job_of_a_cut_node_goes_on_and_is_recorded_when_it_is_back(
        self, kind: str, tmp_path: Path, base: Path
    ) -> None:
        with own_postgres() as postgres:
            site = Site(tmp_path / "home", postgres.url, base)
            await upgrade(site.database)
            try:
                async with links(kind, 2, postgres) as ways:
                    await self.cut_and_mend(site, dict(zip(("a", "b"), ways, strict=True)))
            finally:
                await site.close()

    async def cut_and_mend(self, site: Site, ways: dict[str, tuple[Link, str]]) -> None:
        first = [await site.submit(SCRIPT, parameters={"ticks": 5, "gate": "go"}) for _ in ways]
        for node, (way, url) in ways.items():
            site.start_worker(node, command=way.command, DEEPE_DATABASE_URL=url)
        for job in first:
            await site.wait(job, JobStatus.RUNNING)
        nodes = {await node_of(site, job): job for job in first}
        assert set(nodes) == {"a", "b"}

        ways["b"][0].cut()
        later = await site.submit(SCRIPT, parameters={"ticks": 5})
        await let_an_hour_pass(site.database)
        (site.root / "go").touch()
        await site.wait_for_end(nodes["a"], later)
        await until(lambda: _true(ended(site, nodes["b"])), "the script on the cut node", report=site.report)
        beyond = await site.row(nodes["b"])
        ways["b"][0].mend()
        back = await site.wait(nodes["b"])

        assert (beyond.status, beyond.attempts) == (JobStatus.RUNNING, 1)
        assert (back.status, back.attempts) == (JobStatus.SUCCEEDED, 1), site.story(back)
        assert await node_of(site, later) == "a"
        await check(site, *first, later)


class TestFrozenWorker:
    async def test_that_resumes_after_its_lease_changes_nothing(self, any_site: Site) -> None:
        """Not even with the node's other supervisors dead meanwhile: they are adopted, not replaced."""
        job = await any_site.submit(SCRIPT, parameters={"ticks": 5, "gate": "go"})
        frozen = any_site.start_worker("a")
        await any_site.wait(job, JobStatus.RUNNING)

        frozen.process.send_signal(signal.SIGSTOP)
        await let_an_hour_pass(any_site.database)
        any_site.start_worker("b")
        later = await any_site.submit(SCRIPT, parameters={"ticks": 5})
        await any_site.wait(later)
        (any_site.root / "go").touch()
        await until(lambda: _true(ended(any_site, job)), "the end of the script", report=any_site.report)
        meanwhile = await any_site.row(job)
        frozen.process.send_signal(signal.SIGCONT)
        row = await any_site.wait(job)

        assert (meanwhile.status, meanwhile.attempts) == (JobStatus.RUNNING, 1)
        assert (row.status, row.attempts) == (JobStatus.SUCCEEDED, 1), any_site.story(row)
        await check(any_site, job, later)

    async def test_launcher_that_resumes_finds_its_attempt_run_by_another(self, any_site: Site) -> None:
        """It froze between its claim and the start, and its node was given to another worker by force."""
        job = await any_site.submit(SCRIPT, parameters={"ticks": 5, "gate": "go"})
        pause = any_site.root / "pause"
        frozen = any_site.start_worker(DEEPE_FAULT_POINT=f"after-spec={pause}", DEEPE_FAULT_SIGNAL="STOP")
        await until(lambda: _true(pause.exists()), "the frozen launcher", report=any_site.report)
        (any_site.node_home().root / "agent.lock").unlink()

        any_site.start_worker()
        await any_site.wait(job, JobStatus.RUNNING)
        frozen.process.send_signal(signal.SIGCONT)
        (any_site.root / "go").touch()
        row = await any_site.wait(job)

        assert (row.status, row.attempts) == (JobStatus.SUCCEEDED, 1), any_site.story(row)
        await check(any_site, job)


class TestLostNotification:
    async def test_job_is_found_by_an_idle_worker(self, site: Site) -> None:
        """Its notification was lost; the worker had nothing to do for a whole beat."""
        first = await site.submit(SCRIPT, parameters={"ticks": 1})
        site.start_worker()
        await site.wait(first)
        await until(lambda: _true(not site.control_folders()), "the folder's end", report=site.report)
        before = await heartbeat(site)
        await until(lambda: beats_after(site, before), "the next beat", report=site.report)

        job = await site.submit(SCRIPT, parameters={"ticks": 1})
        row = await site.wait(job)

        assert row.status is JobStatus.SUCCEEDED
        await check(site, first, job)


async def heartbeat(site: Site) -> datetime:
    async with site.database.reading() as session:
        return (await session.exec(select(NodeRow.heartbeat_at))).one()


async def beats_after(site: Site, before: datetime) -> bool:
    return await heartbeat(site) > before


async def _true(value: bool) -> bool:
    return value
