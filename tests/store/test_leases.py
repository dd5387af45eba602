"""Accelerators are held from the claim to the proof that nothing is left, on both databases."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from app.domain.enums import EndReason, JobKind, JobStatus
from app.store import job_attempts, leases
from app.store.clock import database_now
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.leases import AcceleratorInUse, AcceleratorNotFound
from app.store.session import Database
from app.store.tables import LeaseRow
from tests.job_rows import FAILURE, START, SUCCESS, add_job, add_node, cards, claim

LATER = START + timedelta(seconds=30)
STUCK = replace(FAILURE, exit={"unkillable": 1})
LOST = End(status=JobStatus.FAILED, reason=EndReason.NODE_LOST, params={})


async def _free(database: Database, node: str, of: int) -> set[str]:
    async with database.reading() as session:
        held = (await leases.held(session, [node])).get(node, {})
    return {card.id for card in cards(of)} - set(held)


async def _end(database: Database, won: Claim | None, end: End = SUCCESS) -> None:
    assert won is not None
    async with database.writing() as session:
        assert await job_attempts.finish(session, won, end, now=LATER)


class TestHolding:
    async def test_training_holds_one_accelerator_where_there_are_some(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(2))
        for _ in range(3):
            await add_job(database)

        won = [await claim(database, node, slots=0) for _ in range(3)]

        assert [one.attempt.accelerators for one in won if one] == [["card-0"], ["card-1"]]
        assert await _free(database, node, 2) == set()
        await _end(database, won[0])
        assert await _free(database, node, 2) == {"card-0"}
        again = await claim(database, node, slots=0)
        assert again is not None
        assert again.attempt.accelerators == ["card-0"]

    async def test_node_without_any_gives_a_slot(self, database: Database) -> None:
        node = await add_node(database)
        await add_job(database)

        assert await claim(database, node, slots=0) is None
        won = await claim(database, node, slots=1)

        assert won is not None
        assert won.attempt.accelerators == []

    @pytest.mark.parametrize(("kind", "accelerators"), [(JobKind.DEPLOYMENT, None), (JobKind.TRAINING, 0)])
    async def test_who_holds_none_takes_a_slot(
        self, database: Database, kind: JobKind, accelerators: int | None
    ) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database, kind=kind, resources={} if accelerators is None else {"accelerators": accelerators})

        assert await claim(database, node, slots=0) is None
        won = await claim(database, node, slots=1)

        assert won is not None
        assert won.attempt.accelerators == []
        assert await _free(database, node, 1) == {"card-0"}

    async def test_explicit_number_is_never_run_where_there_are_fewer(self, database: Database) -> None:
        none, two = await add_node(database), await add_node(database, "node-2", accelerators=cards(2))
        wanted = await add_job(database, resources={"accelerators": 2})
        await add_job(database, resources={"accelerators": 3}, priority=-1)

        assert await claim(database, none) is None
        won = await claim(database, two)

        assert won is not None
        assert (won.job.id, won.attempt.accelerators) == (wanted, ["card-0", "card-1"])

    async def test_as_many_as_the_stage_has_processes_where_there_are_any(self, database: Database) -> None:
        none, four = await add_node(database), await add_node(database, "node-2", accelerators=cards(4))
        for _ in range(2):
            await add_job(database, launch={"launcher": {"kind": "torchrun", "processes": 2}})

        on_cpu, on_cards = await claim(database, none), await claim(database, four)

        assert on_cpu is not None
        assert on_cpu.attempt.accelerators == []
        assert on_cards is not None
        assert on_cards.attempt.accelerators == ["card-0", "card-1"]

    async def test_strangers_are_left_alone(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(2))
        await add_job(database)
        await add_job(database)

        won = await claim(database, node, usable=["card-1"])

        assert won is not None
        assert won.attempt.accelerators == ["card-1"]
        assert await claim(database, node, usable=["card-1"]) is None

    async def test_second_holder_is_impossible(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database)
        won = await claim(database, node)
        assert won is not None

        with pytest.raises(sa.exc.IntegrityError):
            async with database.writing() as session:
                await leases.take(session, [won.attempt])

    async def test_begins_after_the_one_before_however_long_its_claim_has_waited(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database)
        await add_job(database)
        first = await claim(database, node)
        async with database.writing() as session:
            began = await database_now(session)  # of a claim that waits until the other attempt ends
        assert first is not None
        async with database.writing() as session:
            assert await job_attempts.finish(session, first, SUCCESS, now=await database_now(session))

        assert await claim(database, node, now=began) is not None

        async with database.reading() as session:
            before, after = (await session.exec(select(LeaseRow).order_by(col(LeaseRow.created_at)))).all()
        assert before.released_at is not None
        assert after.created_at >= before.released_at

    async def test_attempt_that_is_tried_again_gives_back_what_it_held(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database)
        won = await claim(database, node)
        assert won is not None

        async with database.writing() as session:
            reason, ended = EndReason.SUPERVISOR_LOST, {"unkillable": 0}
            assert await job_attempts.requeue(session, won, reason=reason, exit_record=ended, now=LATER)

        assert await _free(database, node, 1) == {"card-0"}

    async def test_stale_end_releases_nothing(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database)
        stale = await claim(database, node)
        assert stale is not None
        async with database.writing() as session:
            reason, ended = EndReason.SUPERVISOR_LOST, {"unkillable": 0}
            await job_attempts.requeue(session, stale, reason=reason, exit_record=ended, now=LATER)
        assert await claim(database, node) is not None

        async with database.writing() as session:
            assert not await job_attempts.finish(session, stale, FAILURE, now=LATER)

        assert await _free(database, node, 1) == set()


class TestQuarantine:
    @pytest.mark.parametrize("end", [STUCK, LOST], ids=["unkillable", "node lost"])
    async def test_accelerator_stays_out_of_use_until_its_node_saw_that_nothing_is_left(
        self, database: Database, end: End
    ) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database)
        await add_job(database)
        won = await claim(database, node)
        assert won is not None
        await _end(database, won, end)

        assert await claim(database, node) is None
        async with database.writing() as session:
            assert await leases.quarantined_attempts(session, node) == [won.attempt.id]
            assert await leases.release_proven(session, [won.attempt.id], now=LATER) == 1
        assert await claim(database, node) is not None

    async def test_proof_releases_nothing_that_a_live_attempt_holds(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(1))
        await add_job(database)
        won = await claim(database, node)
        assert won is not None

        async with database.writing() as session:
            assert await leases.quarantined_attempts(session, node) == []
            assert await leases.release_proven(session, [won.attempt.id], now=LATER) == 0

    async def test_person_releases_what_is_quarantined_and_nothing_else(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(2))
        await add_job(database)
        won = await claim(database, node)

        async with database.writing() as session:
            with pytest.raises(AcceleratorInUse):
                await leases.release(session, node, "card-0", now=LATER)
            with pytest.raises(AcceleratorNotFound):
                await leases.release(session, node, "card-2", now=LATER)
            await leases.release(session, "node-1", "card-1", now=LATER)  # free: nothing to do
        await _end(database, won, STUCK)
        for _ in range(2):
            async with database.writing() as session:
                await leases.release(session, node, "card-0", now=LATER)

        assert await _free(database, node, 2) == {"card-0", "card-1"}
        async with database.reading() as session:
            (row,) = (await session.exec(select(LeaseRow))).all()
        assert (row.live, row.quarantined_at, row.released_at) == (False, LATER, LATER)
