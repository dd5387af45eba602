"""Nodes that a person drains, declares dead or removes, with real workers. A dead one that lives harms nothing."""

import asyncio
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.domain.enums import EndReason, JobStatus
from app.executor.nodes.joining import set_join_token
from app.executor.nodes.node_actions import NodeActions
from app.registry.nodes.service import NodeState
from app.store import nodes
from tests.waiting import until
from tests.worker.harness import ENDED_WELL, Site, Worker, pids_alive

# says which attempt it is; every attempt waits for a gate of its own
STAGE = """
import os, play
mine = os.environ["DEEPE_OUTPUT_DIR"].split("/")[-2]
play.journal("run" + mine)
play.wait_for("go" + mine)
play.journal("done" + mine)
play.adapter()
"""


async def state(site: Site, node: str) -> NodeState:
    async with site.database.reading() as session:
        return (await NodeActions().get(session, node)).state


async def reaches(site: Site, node: str, *states: NodeState) -> None:
    async def look() -> bool:
        return await state(site, node) in states

    await until(look, f"{node} {states}", site.report)


async def registered(site: Site, node: str) -> None:
    async def look() -> bool:
        async with site.database.reading() as session:
            return node in {row.name for row in await nodes.all_nodes(session)}

    await until(look, f"the node {node}", site.report)


async def freeze(site: Site, worker: Worker, node: str) -> None:
    """Stop the worker's process, and let the database believe that this was minutes ago."""
    worker.process.send_signal(signal.SIGSTOP)
    async with site.database.writing() as session:
        row = await nodes.get_node(session, node)
        await nodes.heartbeat(session, row.id, now=datetime.now(UTC) - timedelta(minutes=5))


def journal_pids(site: Site, job_id: str) -> list[int]:
    return [int(line.split()[1]) for line in (site.root / "journal" / job_id).read_text().splitlines()]


async def declare_dead(site: Site, node: str) -> None:
    async with site.database.writing() as session:
        await NodeActions().declare_dead(session, node, confirm=node)


async def until_log(worker: Worker, event: str) -> None:
    async def look() -> bool:
        return bool(worker.events(event))

    await until(look, event, lambda: worker.log)


class TestDeclaredDead:
    async def test_zombie_is_stopped_and_the_other_attempt_counts(self, any_site: Site) -> None:
        site = any_site
        zombie = site.start_worker("one")
        job_id = await site.submit(STAGE)
        await site.wait(job_id, JobStatus.RUNNING)
        await site.wait_for_journal(job_id, "run1")
        await freeze(site, zombie, "one")

        await declare_dead(site, "one")
        site.start_worker("two")
        await site.wait_for_journal(job_id, "run2")
        assert len(site.control_folders("one")) == 1  # the first stage goes on: its machine was not gone after all

        zombie.process.send_signal(signal.SIGCONT)
        await until_log(zombie, "node_returned")
        assert site.control_folders("one") == []
        assert await state(site, "one") is NodeState.READY
        assert (await site.row(job_id)).status is JobStatus.RUNNING

        site.open("go1")
        site.open("go2")
        row = await site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (*ENDED_WELL, 2), site.story(row)
        assert site.journal(job_id) == ["run1", "run2", "done2"]
        first, second = sorted(await site.attempts(job_id), key=lambda attempt: attempt.number)
        assert (first.reason, second.reason) == (EndReason.NODE_LOST, EndReason.COMPLETED)
        assert (row.retries, row.recoveries) == (0, 1)
        model = (await site.models())[job_id]
        assert model.path is not None
        assert Path(model.path).parts[-2:] == ("2", "output")

    async def test_end_that_the_zombie_saw_is_dropped(self, site: Site) -> None:
        """Its stage ends while it is frozen; the job has been given away by then."""
        zombie = site.start_worker("one")
        job_id = await site.submit(STAGE)
        await site.wait_for_journal(job_id, "run1")
        await site.wait(job_id, JobStatus.RUNNING)
        await freeze(site, zombie, "one")
        await declare_dead(site, "one")
        site.open("go1")
        await site.wait_for_journal(job_id, "done1")

        zombie.process.send_signal(signal.SIGCONT)
        await until_log(zombie, "node_returned")
        await site.wait_for_journal(job_id, "run2")  # the returned node takes it, as a new attempt
        site.open("go2")
        row = await site.wait(job_id)

        assert (row.status, row.reason, row.attempts) == (*ENDED_WELL, 2), site.story(row)
        assert site.journal(job_id) == ["run1", "done1", "run2", "done2"]

    async def test_worker_that_starts_again_ends_what_is_left_before_it_works(self, site: Site) -> None:
        first = site.start_worker("one", DEEPE_SIMULATED_ACCELERATORS="1")
        job_id = await site.submit(STAGE)
        await site.wait_for_journal(job_id, "run1")
        await site.wait(job_id, JobStatus.RUNNING)
        await freeze(site, first, "one")
        await declare_dead(site, "one")
        first.kill()

        again = site.start_worker("one", DEEPE_SIMULATED_ACCELERATORS="1")
        await site.wait_for_journal(job_id, "run2")  # on the same accelerator: it was given back after the proof

        assert again.events("node_returned")
        assert len(site.control_folders("one")) == 1
        site.open("go1")
        site.open("go2")
        row = await site.wait(job_id)
        assert (row.status, row.attempts) == (JobStatus.SUCCEEDED, 2), site.story(row)
        assert site.journal(job_id) == ["run1", "run2", "done2"]


class TestDrained:
    async def test_finishes_what_runs_and_begins_nothing(self, site: Site) -> None:
        site.start_worker("one", DEEPE_SLOTS="2")
        job_id = await site.submit(STAGE)
        await site.wait_for_journal(job_id, "run1")

        async with site.database.writing() as session:
            assert (await NodeActions().drain(session, "one")).state is NodeState.DRAINING
        waiting = await site.submit(STAGE)
        site.open("go1")
        row = await site.wait(job_id)
        await reaches(site, "one", NodeState.DRAINED)

        assert (row.status, row.reason) == ENDED_WELL, site.story(row)
        assert (await site.row(waiting)).status is JobStatus.QUEUED
        async with site.database.writing() as session:
            await NodeActions().undrain(session, "one")
        assert (await site.wait(waiting)).status is JobStatus.SUCCEEDED


class TestIdentity:
    async def test_other_machine_with_the_same_name_is_refused(self, site: Site, tmp_path: Path) -> None:
        site.start_worker("one")
        await registered(site, "one")

        second = site.start_worker("one", DEEPE_NODE_HOME=str(tmp_path / "elsewhere"))
        await asyncio.to_thread(second.process.wait)

        assert second.process.returncode == 2
        assert "DEEPE_NODE_NAME" in second.log
        assert "Traceback" not in second.log

    async def test_worker_without_the_join_token_says_what_to_do(self, site: Site) -> None:
        async with site.database.writing() as session:
            await set_join_token(session, "kTz4-1xQ8vB2m7Lw0sRd")

        refused = site.start_worker("one")
        await asyncio.to_thread(refused.process.wait)
        site.start_worker("one", DEEPE_JOIN_TOKEN="kTz4-1xQ8vB2m7Lw0sRd")
        await registered(site, "one")

        assert refused.process.returncode == 2
        assert "DEEPE_JOIN_TOKEN" in refused.log
        assert "kTz4" not in refused.log

    async def test_removed_node_ends_and_joins_anew(self, site: Site) -> None:
        worker = site.start_worker("one")
        await registered(site, "one")
        async with site.database.writing() as session:
            old = (await NodeActions().drain(session, "one")).row.id
            await NodeActions().remove(session, "one", check=lambda version: None)

        await asyncio.to_thread(worker.process.wait)
        site.start_worker("one")
        await registered(site, "one")

        assert worker.process.returncode == 2
        assert "was removed" in worker.log
        async with site.database.reading() as session:
            assert (await nodes.get_node(session, "one")).id != old

    async def test_node_that_joins_anew_ends_what_its_home_still_runs_first(self, site: Site) -> None:
        """Removed while its machine was thought to be gone; no row knows its script any more."""
        first = site.start_worker("one")
        job_id = await site.submit("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STAGE)
        await site.wait_for_journal(job_id, "run1")
        await site.wait(job_id, JobStatus.RUNNING)
        await freeze(site, first, "one")
        await declare_dead(site, "one")
        async with site.database.writing() as session:
            await NodeActions().remove(session, "one", check=lambda version: None)
        first.kill()
        (pid,) = journal_pids(site, job_id)

        site.start_worker("one", DEEPE_STOP_GRACE_SECONDS="1")
        await site.wait_for_journal(job_id, "run2")

        assert pids_alive([pid]) == []
        site.open("go2")
        assert (await site.wait(job_id)).status is JobStatus.SUCCEEDED
        assert site.journal(job_id) == ["run1", "run2", "done2"]
