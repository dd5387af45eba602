"""The queue on both databases: who wins a job, whose writes count, what an end does to the jobs that wait for it."""

import asyncio
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.projects import DEFAULT_SCOPE
from app.domain.transitions import TERMINAL
from app.store import claims, job_attempts, job_queries, job_status, jobs
from app.store.claims import Offer
from app.store.job_attempts import Claim
from app.store.job_status import JobAlreadyFinished
from app.store.jobs import JobNotFound
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import AttemptRow, JobEventRow, JobRow
from tests.job_rows import (
    ENVIRONMENT,
    FAILURE,
    LEASE,
    START,
    SUCCESS,
    add_job,
    add_method,
    add_node,
    claim,
    insert,
    new_chain,
    new_job,
)

LATER = START + timedelta(seconds=30)
QUEUED_JOBS = 400
CLAIMERS = 4


async def _job(database: Database, job_id: str) -> JobRow:
    async with database.reading() as session:
        return await jobs.get(session, job_id)


async def _statuses(database: Database, job_ids: list[str]) -> list[JobStatus]:
    return [(await _job(database, job_id)).status for job_id in job_ids]


async def _attempts(database: Database, job_id: str) -> list[AttemptRow]:
    async with database.reading() as session:
        statement = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(col(AttemptRow.number))
        return list((await session.exec(statement)).all())


async def _transitions(database: Database, job_id: str) -> list[tuple[JobStatus, EndReason | None, int]]:
    async with database.reading() as session:
        return [(row.status, row.reason, row.attempt) for row in await jobs.events_after(session, job_id, 0)]


async def _claimed(database: Database, **overrides: object) -> Claim:
    job_id = await add_job(database, **overrides)
    won = await claim(database, await add_node(database))
    assert won is not None
    assert won.job.id == job_id
    return won


async def _cancel(database: Database, job_id: str) -> None:
    async with database.writing() as session:
        await job_status.request_cancel(session, job_id, now=LATER)


class TestInsert:
    async def test_records_that_every_job_of_the_chain_is_queued(self, database: Database) -> None:
        first, second, third = await insert(database, *new_chain())

        assert await _statuses(database, [first, second, third]) == [JobStatus.QUEUED] * 3
        assert await _transitions(database, third) == [(JobStatus.QUEUED, None, 0)]
        async with database.reading() as session:
            assert [job.id for job in await jobs.chain_of(session, [first])] == [first, second, third]

    async def test_unknown_job_is_not_found(self, database: Database) -> None:
        async with database.reading() as session:
            with pytest.raises(JobNotFound):
                await jobs.get(session, "no-such-job")

    async def test_second_unfinished_build_of_an_environment_on_a_node_is_impossible(self, database: Database) -> None:
        node = await add_node(database)
        await add_job(database, kind=JobKind.ENVIRONMENT, node_id=node)

        with pytest.raises(sa.exc.IntegrityError):
            await add_job(database, kind=JobKind.ENVIRONMENT, node_id=node)

        other = await add_node(database, "node-2")
        await add_job(database, kind=JobKind.ENVIRONMENT, node_id=other)


class TestClaim:
    async def test_makes_a_live_attempt_with_a_lease(self, database: Database) -> None:
        node = await add_node(database)
        job_id = await add_job(database)

        won = await claim(database, node)

        assert won is not None
        job = await _job(database, job_id)
        assert (job.status, job.node_id, job.attempts) == (JobStatus.LAUNCHING, node, 1)
        (attempt,) = await _attempts(database, job_id)
        assert attempt.live
        assert attempt.lease_expires_at == START + LEASE
        assert attempt.token == job.token == won.attempt.token
        assert (await _transitions(database, job_id))[-1] == (JobStatus.LAUNCHING, None, 1)

    async def test_returns_none_if_nothing_waits(self, database: Database) -> None:
        assert await claim(database, await add_node(database)) is None

    async def test_takes_urgent_jobs_first_then_the_oldest(self, database: Database) -> None:
        node = await add_node(database)
        young = await add_job(database, created_at=LATER)
        old = await add_job(database)
        urgent = await add_job(database, created_at=LATER + LEASE, priority=-10)

        order = [await claim(database, node) for _ in range(3)]

        assert [won.job.id for won in order if won] == [urgent, old, young]

    async def test_leaves_blocked_jobs_and_other_kinds_and_environments(self, database: Database) -> None:
        node = await add_node(database)
        training, saving = await insert(database, *new_chain(JobKind.TRAINING, JobKind.SAVING))
        await add_job(database, environment="unheard-of")

        assert await claim(database, node, kinds={JobKind.SAVING, JobKind.DEPLOYMENT}) is None
        won = await claim(database, node)
        assert won is not None
        assert won.job.id == training
        assert await claim(database, node) is None
        assert (await _job(database, saving)).status is JobStatus.QUEUED

    async def test_environment_is_built_by_its_own_node_only(self, database: Database) -> None:
        mine, other = await add_node(database), await add_node(database, "node-2")
        build = await add_job(database, kind=JobKind.ENVIRONMENT, node_id=mine, environment="new")

        assert await claim(database, other, kinds={JobKind.ENVIRONMENT}) is None
        won = await claim(database, mine, kinds={JobKind.ENVIRONMENT}, environments=())
        assert won is not None
        assert won.job.id == build

    async def test_two_sessions_that_race_for_a_job_do_not_both_win(self, database: Database) -> None:
        first, second = await add_node(database), await add_node(database, "node-2")
        job_id = await add_job(database)

        wins = await asyncio.gather(*(claim(database, node) for node in (first, second) * 4))

        (won,) = [win for win in wins if win is not None]
        assert (await _job(database, job_id)).token == won.attempt.token
        assert len(await _attempts(database, job_id)) == 1

    async def test_rolled_back_claim_leaves_the_job_to_others(self, database: Database) -> None:
        node = await add_node(database)
        job_id = await add_job(database)

        async with database.engine.connect() as connection:
            session = AsyncSession(connection)
            offer = Offer(node_id=node, environments=[ENVIRONMENT], slots=1)
            await claims.claim(session, offer, kinds=[JobKind.TRAINING], now=START, lease=LEASE)
            await session.close()  # the node died before its commit

        won = await claim(database, node)
        assert won is not None
        assert (won.job.id, won.attempt.number) == (job_id, 1)

    async def test_second_live_attempt_is_impossible(self, database: Database) -> None:
        won = await _claimed(database)

        with pytest.raises(sa.exc.IntegrityError):
            async with database.writing() as session:
                session.add(
                    AttemptRow(
                        id="second",
                        job_id=won.job.id,
                        number=2,
                        node_id=won.attempt.node_id,
                        token="other",
                        live=True,
                        lease_expires_at=LATER,
                        created_at=LATER,
                    )
                )

    async def test_concurrent_claimers_take_hundreds_of_jobs_exactly_once(self, database: Database) -> None:
        claimers = [await add_node(database, f"node-{number}") for number in range(CLAIMERS)]
        ids = await insert(database, *(new_job() for _ in range(QUEUED_JOBS)))
        taken: list[str] = []

        async def take(node: str) -> None:
            while len(taken) < QUEUED_JOBS:  # a None may only mean that others were faster
                won = await claim(database, node)
                if won is not None:
                    taken.append(won.job.id)

        await asyncio.gather(*(take(node) for node in claimers))

        assert Counter(taken) == Counter(ids)
        async with database.reading() as session:
            attempts = (await session.exec(select(AttemptRow.job_id))).all()
            launches = select(JobEventRow.job_id).where(JobEventRow.status == JobStatus.LAUNCHING)
            events = (await session.exec(launches)).all()
        assert sorted(attempts) == sorted(events) == sorted(ids)

    async def test_reads_one_stretch_of_the_queue_however_long_it_is(self, tmp_path: Path) -> None:
        database = Database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", scope=DEFAULT_SCOPE)
        await upgrade(database)
        node = await add_node(database)
        await insert(database, *new_chain())
        said: list[tuple[str, Any]] = []
        sa.event.listen(
            database.engine.sync_engine,
            "before_cursor_execute",
            lambda _connection, _cursor, statement, parameters, *_: said.append((statement, parameters)),
        )
        won = await claim(database, node)
        assert won is not None
        async with database.writing() as session:
            await job_attempts.finish(session, won, SUCCESS, now=LATER)
        statements = [one for one in said if "FROM job" in one[0] or "UPDATE job" in one[0]]

        async with database.engine.connect() as connection:
            plans = [
                row.detail
                for statement, parameters in statements
                for row in await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            ]
        await database.close()

        assert "SEARCH job USING INDEX ix_job_queue (kind=? AND demand=?)" in plans
        assert not [plan for plan in plans if "SCAN job" in plan or "ix_job_status" in plan]


class TestLease:
    async def test_live_attempts_are_those_of_the_node(self, database: Database) -> None:
        mine, other = await add_node(database), await add_node(database, "node-2")
        job_id = await add_job(database)
        await claim(database, mine)

        async with database.reading() as session:
            assert [found.job.id for found in await job_attempts.live_attempts(session, mine)] == [job_id]
            assert await job_attempts.live_attempts(session, other) == []

    async def test_renewal_extends_live_leases_only(self, database: Database) -> None:
        node = await add_node(database)
        ended, running = await add_job(database), await add_job(database, created_at=LATER)
        first = await claim(database, node)
        assert first is not None
        async with database.writing() as session:
            await job_attempts.finish(session, first, SUCCESS, now=START)
        await claim(database, node)

        async with database.writing() as session:
            await job_attempts.renew_leases(session, node, now=LATER, lease=LEASE)

        assert (await _attempts(database, ended))[0].lease_expires_at == START + LEASE
        assert (await _attempts(database, running))[0].lease_expires_at == LATER + LEASE


class TestNodeWrites:
    async def test_running_then_stopping_then_end(self, database: Database) -> None:
        won = await _claimed(database)

        async with database.writing() as session:
            assert await job_attempts.mark_running(session, won, now=START)
            assert await job_attempts.mark_stopping(session, won, now=LATER)
            assert await job_attempts.finish(session, won, FAILURE, now=LATER)

        job = await _job(database, won.job.id)
        assert (job.status, job.reason, job.started_at, job.finished_at) == (
            JobStatus.FAILED, EndReason.EXIT_CODE, START, LATER,
        )  # fmt: skip
        assert job.reason_params["log_tail"][-1] == "ValueError: no"
        (attempt,) = await _attempts(database, won.job.id)
        assert (attempt.live, attempt.reason, attempt.finished_at) == (False, EndReason.EXIT_CODE, LATER)
        assert await _transitions(database, won.job.id) == [
            (JobStatus.QUEUED, None, 0),
            (JobStatus.LAUNCHING, None, 1),
            (JobStatus.RUNNING, None, 1),
            (JobStatus.STOPPING, None, 1),
            (JobStatus.FAILED, EndReason.EXIT_CODE, 1),
        ]

    async def test_status_that_does_not_allow_the_write_is_left_alone(self, database: Database) -> None:
        won = await _claimed(database)

        async with database.writing() as session:
            await job_attempts.mark_stopping(session, won, now=LATER)
            assert not await job_attempts.mark_running(session, won, now=LATER)

        assert (await _job(database, won.job.id)).status is JobStatus.STOPPING
        assert (await _transitions(database, won.job.id))[-1] == (JobStatus.STOPPING, None, 1)

    async def test_end_is_written_once(self, database: Database) -> None:
        won = await _claimed(database)

        async with database.writing() as session:
            assert await job_attempts.finish(session, won, SUCCESS, now=START)
        async with database.writing() as session:
            assert not await job_attempts.finish(session, won, FAILURE, now=LATER)

        job = await _job(database, won.job.id)
        assert (job.status, job.reason, job.finished_at) == (JobStatus.SUCCEEDED, EndReason.COMPLETED, START)
        assert len(await _transitions(database, won.job.id)) == 3

    async def test_requeued_job_is_claimed_again_as_a_new_attempt(self, database: Database) -> None:
        won = await _claimed(database)

        async with database.writing() as session:
            assert await job_attempts.requeue(session, won, reason=EndReason.SUPERVISOR_LOST, now=LATER)
        again = await claim(database, won.attempt.node_id)

        assert again is not None
        assert again.attempt.number == 2
        assert [(row.live, row.reason) for row in await _attempts(database, won.job.id)] == [
            (False, EndReason.SUPERVISOR_LOST),
            (True, None),
        ]

    async def test_stale_token_changes_nothing(self, database: Database) -> None:
        stale = await _claimed(database)
        async with database.writing() as session:
            await job_attempts.requeue(session, stale, reason=EndReason.SUPERVISOR_LOST, now=LATER)
        fresh = await claim(database, await add_node(database, "node-2"))
        assert fresh is not None
        before = await _transitions(database, stale.job.id)

        async with database.writing() as session:
            assert not await job_attempts.mark_running(session, stale, now=LATER)
            assert not await job_attempts.mark_stopping(session, stale, now=LATER)
            assert not await job_attempts.requeue(session, stale, reason=EndReason.SUPERVISOR_LOST, now=LATER)
            assert not await job_attempts.finish(session, stale, FAILURE, now=LATER)

        job = await _job(database, stale.job.id)
        assert (job.status, job.token, job.node_id) == (
            JobStatus.LAUNCHING, fresh.attempt.token, fresh.attempt.node_id,
        )  # fmt: skip
        assert [row.live for row in await _attempts(database, job.id)] == [False, True]
        assert await _transitions(database, job.id) == before


class TestChain:
    async def test_success_releases_the_successor_with_the_model(self, database: Database) -> None:
        node = await add_node(database)
        training, saving, deployment = await insert(database, *new_chain())
        won = await claim(database, node)
        assert won is not None
        assert won.job.id == training

        async with database.writing() as session:
            await job_attempts.finish(
                session,
                won,
                job_status.End(JobStatus.SUCCEEDED, EndReason.COMPLETED, {}, result_model_id="m"),
                now=LATER,
            )

        assert (await _job(database, training)).result_model_id == "m"
        released = await _job(database, saving)
        assert (released.blocked_by, released.model_id) == (None, "m")
        assert (await _job(database, deployment)).blocked_by == saving
        following = await claim(database, node)
        assert following is not None
        assert following.job.id == saving
        assert await claim(database, node) is None

    async def test_failure_cancels_all_that_waits(self, database: Database) -> None:
        node = await add_node(database)
        training, saving, deployment = await insert(database, *new_chain())
        won = await claim(database, node)
        assert won is not None

        async with database.writing() as session:
            await job_attempts.finish(session, won, FAILURE, now=LATER)

        assert await _statuses(database, [training, saving, deployment]) == [
            JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.CANCELLED,
        ]  # fmt: skip
        for job_id in (saving, deployment):
            job = await _job(database, job_id)
            assert (job.reason, job.reason_params) == (EndReason.PREDECESSOR_FAILED, {"predecessor": training})
            assert (await _transitions(database, job_id))[-1][:2] == (JobStatus.CANCELLED, EndReason.PREDECESSOR_FAILED)

    async def test_environment_that_cannot_be_had_fails_its_jobs_and_ends_their_chains(
        self, database: Database
    ) -> None:
        waiting, following = await insert(database, *new_chain(JobKind.TRAINING, JobKind.SAVING, environment="gone"))
        other = await add_job(database)

        async with database.writing() as session:
            count = await job_status.fail_queued(
                session, environment="gone", reason=EndReason.ENV_MISSING, params={"environment": "gone"}, now=LATER
            )

        assert count == 1
        assert await _statuses(database, [waiting, following, other]) == [
            JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED,
        ]  # fmt: skip

    async def test_jobs_that_came_later_are_spared(self, database: Database) -> None:
        before = await add_job(database, environment="gone")
        after = await add_job(database, environment="gone", updated_at=LATER + timedelta(seconds=1))

        async with database.writing() as session:
            count = await job_status.fail_queued(
                session, environment="gone", reason=EndReason.ENV_MISSING, params={}, now=LATER, waiting_since=LATER
            )

        assert count == 1
        assert await _statuses(database, [before, after]) == [JobStatus.FAILED, JobStatus.QUEUED]


class TestRequestCancel:
    async def test_queued_job_ends_at_once_with_its_successors(self, database: Database) -> None:
        ids = await insert(database, *new_chain())

        await _cancel(database, ids[0])

        assert await _statuses(database, ids) == [JobStatus.CANCELLED] * 3
        assert [(await _job(database, job_id)).reason for job_id in ids] == [
            EndReason.CANCELLED, EndReason.PREDECESSOR_FAILED, EndReason.PREDECESSOR_FAILED,
        ]  # fmt: skip
        assert await claim(database, await add_node(database)) is None

    async def test_live_job_is_asked_to_stop_once(self, database: Database) -> None:
        won = await _claimed(database)

        await _cancel(database, won.job.id)
        async with database.writing() as session:
            again = await job_status.request_cancel(session, won.job.id, now=LATER + LEASE)

        assert (again.status, again.cancel_requested_at) == (JobStatus.LAUNCHING, LATER)

    @pytest.mark.parametrize("end", [SUCCESS, FAILURE], ids=["succeeded", "failed"])
    async def test_is_refused_after_the_end(self, database: Database, end: job_status.End) -> None:
        won = await _claimed(database)
        async with database.writing() as session:
            await job_attempts.finish(session, won, end, now=LATER)

        with pytest.raises(JobAlreadyFinished):
            await _cancel(database, won.job.id)

        assert (await _job(database, won.job.id)).status is end.status

    async def test_race_with_a_claim_ends_the_job_or_reaches_its_node(self, database: Database) -> None:
        node = await add_node(database)
        ids = await insert(database, *(new_job(created_at=START + timedelta(seconds=n)) for n in range(8)))

        for job_id in ids:
            await asyncio.gather(claim(database, node), _cancel(database, job_id))

            job = await _job(database, job_id)
            attempts = await _attempts(database, job_id)
            if job.status is JobStatus.CANCELLED:
                assert attempts == []
            else:
                assert job.status is JobStatus.LAUNCHING
                assert job.cancel_requested_at == LATER
                assert [attempt.live for attempt in attempts] == [True]

    async def test_all_unfinished_jobs_of_a_method_are_cancelled(self, database: Database) -> None:
        node, method = await add_node(database), await add_method(database)
        await insert(database, *new_chain(method_id=method))
        other = await add_job(database, created_at=LATER)
        first = await claim(database, node)
        assert first is not None
        async with database.writing() as session:
            await job_attempts.finish(session, first, SUCCESS, now=LATER)
        running = await claim(database, node, kinds={JobKind.SAVING})
        assert running is not None

        async with database.writing() as session:
            assert await jobs.count_unfinished_of_method(session, method) == 2
            await job_status.request_cancel_of_method(session, method, now=LATER)

        async with database.reading() as session:
            training, saving, deployment = await jobs.chain_of(session, [first.job.chain_id])
        assert training.status is JobStatus.SUCCEEDED
        assert (saving.status, saving.cancel_requested_at) == (JobStatus.LAUNCHING, LATER)
        assert (deployment.status, deployment.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED)
        assert (await _job(database, other)).status is JobStatus.QUEUED


class TestTasksOfTheBackend:
    async def test_newest_job_of_a_task_counts(self, database: Database) -> None:
        await add_job(database, external_id="task")
        newest = await add_job(database, external_id="task", created_at=LATER)
        await add_job(database, external_id="other", created_at=LATER)

        async with database.reading() as session:
            found = await job_queries.newest_named(session, "task")
            assert (found and found.id) == newest
            assert await job_queries.newest_named(session, "none") is None

    async def test_job_that_cannot_run_ends_in_the_queue(self, database: Database) -> None:
        job_id, unnamed = await insert(database, new_job(external_id="task"), new_job())
        async with database.writing() as session:
            for failed in (job_id, unnamed):
                await job_status.end_queued(session, failed, FAILURE, now=LATER)

        async with database.reading() as session:
            ended = await job_queries.named_that_ended(session, after=START, before=LATER)
            assert [job.id for job in ended] == [job_id]
            assert await job_queries.named_that_ended(session, after=LATER, before=LATER) == []
        assert [status for status, _, _ in await _transitions(database, job_id)] == [
            JobStatus.QUEUED,
            JobStatus.FAILED,
        ]


class TestLooks:
    async def test_builds_and_waits_are_found(self, database: Database) -> None:
        node = await add_node(database)
        build = await add_job(database, kind=JobKind.ENVIRONMENT, node_id=node, environment="new")
        await insert(database, *new_chain(JobKind.TRAINING, JobKind.SAVING, environment="new"))
        await add_job(database, environment="other", status=JobStatus.QUEUED)

        async with database.reading() as session:
            assert await jobs.unfinished_builds(session, ["new", "other"]) == {"new": build}
            assert set(await jobs.environments_waited_for(session)) == {"new", "other"}

    async def test_transitions_come_after_a_position(self, database: Database) -> None:
        won = await _claimed(database)
        async with database.reading() as session:
            first, second = await jobs.events_after(session, won.job.id, 0)
            assert first.id is not None
            assert [row.id for row in await jobs.events_after(session, won.job.id, first.id)] == [second.id]
            assert {second.status} <= set(JobStatus) - TERMINAL
