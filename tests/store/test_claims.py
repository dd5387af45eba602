"""Placement on both databases: who keeps accelerators for whom, limits under races, what waits and what does not."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import JobKind
from app.domain.kinds import STAGES
from app.domain.projects import DEFAULT_SCOPE
from app.store import claims, job_attempts, job_status, jobs
from app.store.claims import Offer
from app.store.job_attempts import Claim
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import JobEventRow, JobRow, NodeRow, QueueRow
from tests.job_rows import ENVIRONMENT, START, SUCCESS, add_job, add_node, cards, claim, insert, new_job

MINUTE = timedelta(minutes=1)


async def _queue(database: Database, name: str = "q", **limits: Any) -> None:
    async with database.writing() as session:
        session.add(QueueRow(name=name, created_at=START, updated_at=START, **limits))


async def _change_node(database: Database, node: str, **values: Any) -> None:
    async with database.writing() as session:
        await session.exec(sa.update(NodeRow).where(sa.column("id") == node).values(**values))


async def _keeper(database: Database, job_id: str) -> str | None:
    async with database.reading() as session:
        return (await jobs.get(session, job_id)).reserved_node_id


async def _won(database: Database, node: str, **more: Any) -> Claim:
    won = await claim(database, node, **more)
    assert won is not None
    return won


async def _end(database: Database, won: Claim) -> None:
    async with database.writing() as session:
        assert await job_attempts.finish(session, won, SUCCESS, now=START)


async def _expect(database: Database, won: Claim, seconds: float) -> None:
    async with database.writing() as session:
        await job_attempts.expect_ends(session, {won.attempt.id: START + timedelta(seconds=seconds)})


class TestWho:
    async def test_labels_and_memory_have_to_fit(self, database: Database) -> None:
        plain = await add_node(database, "plain", accelerators=cards(1, memory_mib=10_000))
        large = await add_node(database, "large", accelerators=cards(1), labels={"gpu": "a100"})
        labelled = await add_job(database, resources={"labels": {"gpu": "a100"}})
        roomy = await add_job(database, resources={"accelerator_memory_mib": 20_000}, created_at=START + MINUTE)

        assert await claim(database, plain) is None
        first = await _won(database, large)
        assert first.job.id == labelled
        await _end(database, first)
        assert (await _won(database, large)).job.id == roomy

    @pytest.mark.parametrize(
        "state", [{"draining_at": START}, {"dead_at": START}, {"refusal": {"code": "disk_full", "params": {}}}]
    )
    async def test_node_that_takes_no_jobs_takes_none(self, database: Database, state: dict[str, Any]) -> None:
        node = await add_node(database)
        await add_job(database)
        await _change_node(database, node, **state)

        assert await claim(database, node) is None
        await _change_node(database, node, **dict.fromkeys(state, sa.null()))
        assert await claim(database, node) is not None

    async def test_job_starts_no_sooner_than_it_may(self, database: Database) -> None:
        node = await add_node(database)
        later = await add_job(database, not_before=START + MINUTE)
        now = await add_job(database, created_at=START + MINUTE)

        assert (await _won(database, node)).job.id == now
        assert await claim(database, node) is None
        assert (await _won(database, node, now=START + MINUTE)).job.id == later


class TestLimits:
    async def test_limit_of_a_user_lets_others_pass(self, database: Database) -> None:
        node = await add_node(database)
        await _queue(database, max_live_per_user=1)
        mine = [await add_job(database, queue="q", submitted_by="x") for _ in range(2)]
        other = await add_job(database, queue="q", submitted_by="y", created_at=START + MINUTE)
        elsewhere = await add_job(database, submitted_by="x", created_at=START + MINUTE)

        first = await _won(database, node)
        assert first.job.id in mine
        assert {(await _won(database, node)).job.id for _ in range(2)} == {other, elsewhere}
        assert await claim(database, node) is None
        await _end(database, first)
        assert (await _won(database, node)).job.id in mine

    async def test_limit_of_zero_stops_a_queue(self, database: Database) -> None:
        node = await add_node(database)
        await _queue(database, max_live=0)
        await add_job(database, queue="q")

        assert await claim(database, node) is None

    async def test_racing_nodes_never_exceed_a_limit(self, database: Database) -> None:
        nodes = [await add_node(database, f"node-{number}") for number in range(4)]
        await _queue(database, max_live=5, max_live_per_user=2)
        await insert(database, *(new_job(queue="q", submitted_by=f"u{number % 4}") for number in range(40)))

        async def take(node: str) -> list[Claim]:
            tries = [await claim(database, node) for _ in range(10)]
            return [won for won in tries if won is not None]

        taken = [won for found in await asyncio.gather(*(take(node) for node in nodes)) for won in found]

        assert len(taken) == 5
        assert max(Counter(won.job.submitted_by for won in taken).values()) == 2


def _random_job(dice: random.Random) -> JobRow:
    """Return one of a few kinds of jobs, so that queues hold several of each demand."""
    kind = dice.choice([JobKind.TRAINING, JobKind.TRAINING, JobKind.SAVING, JobKind.DEPLOYMENT])
    resources = {"accelerators": dice.choice([1, 1, 2, 3])} if kind is JobKind.TRAINING and dice.random() < 0.6 else {}
    return new_job(
        kind=kind,
        resources=resources,
        priority=dice.choice([0, 0, 5]),
        queue=dice.choice(["q", "default"]),
        submitted_by=dice.choice(["x", "y"]),
        limits={"seconds": dice.choice([60, 6000])} if dice.random() < 0.3 else {},
        created_at=START + dice.randrange(100) * MINUTE,
    )


class TestSeveralAtOnce:
    @pytest.mark.parametrize("free", [0, 1, 4], ids=lambda free: f"{free} cards")
    async def test_are_those_that_one_after_the_other_would_be(self, database: Database, free: int) -> None:
        """Jobs, their order, their accelerators and the reservations are the same, whatever waits."""
        dice = random.Random(free)
        offer = Offer(node_id=await add_node(database, accelerators=cards(free)), environments=[ENVIRONMENT], slots=3)
        await add_node(database, "other", accelerators=cards(2))
        await _queue(database, max_live=5, max_live_per_user=3)
        for _ in range(15):
            async with database.writing() as session:
                await session.exec(sa.delete(JobEventRow))
                await session.exec(sa.delete(JobRow))
            await insert(database, *(_random_job(dice) for _ in range(dice.randrange(1, 25))))

            at_once = await self._outcome(database, offer, most=7)
            one_by_one = await self._outcome(database, offer, most=1)

            assert at_once == one_by_one

    async def _outcome(self, database: Database, offer: Offer, *, most: int) -> tuple[list[Any], dict[str, str | None]]:
        """Return what is claimed and which reservations stand then; nothing of it is kept."""
        found: list[Claim] = []
        async with database.engine.connect() as connection, AsyncSession(connection, expire_on_commit=False) as session:
            while len(found) < 7:
                slots = offer.slots - sum(not won.attempt.accelerators for won in found)
                won = await claims.claim_several(
                    session,
                    replace(offer, slots=slots),
                    kinds=STAGES,
                    now=START + timedelta(days=1),
                    lease=MINUTE,
                    most=min(most, 7 - len(found)),
                )
                if not won:
                    break
                found += won
            rows = (await session.exec(select(JobRow.id, JobRow.reserved_node_id))).all()
            taken = [(won.job.id, won.job.status, tuple(won.attempt.accelerators)) for won in found]
            await session.rollback()
        return taken, dict(rows)

    async def test_racing_nodes_share_the_queue(self, database: Database) -> None:
        nodes = [await add_node(database, f"node-{number}", accelerators=cards(4)) for number in range(4)]
        await insert(database, *(new_job() for _ in range(14)))

        async def take(node: str) -> Sequence[Claim]:
            offer = Offer(node_id=node, environments=[ENVIRONMENT], slots=0)
            async with database.writing() as session:
                return await claims.claim_several(session, offer, kinds=STAGES, now=START, lease=MINUTE, most=4)

        won = [one for found in await asyncio.gather(*(take(node) for node in nodes)) for one in found]

        assert len({one.job.id for one in won}) == len(won)
        held = Counter((one.attempt.node_id, *one.attempt.accelerators) for one in won)
        assert max(held.values()) == 1
        assert len({one.attempt.token for one in won}) == len(won)
        if database.engine.dialect.name == "sqlite":  # on Postgres a node steps over what another has locked
            assert len(won) == 14


class TestReservation:
    async def test_node_that_is_free_soonest_keeps_its_cards_and_the_other_goes_on(self, database: Database) -> None:
        late, soon = [await add_node(database, name, accelerators=cards(2)) for name in ("a-late", "b-soon")]
        for _ in range(2):
            await add_job(database)
        first, second = await _won(database, late), await _won(database, soon)
        await _expect(database, first, 600)
        await _expect(database, second, 60)
        large = await add_job(database, resources={"accelerators": 2}, created_at=START + MINUTE)
        small = [await add_job(database, created_at=START + 2 * MINUTE) for _ in range(2)]

        assert await claim(database, soon) is None
        assert await _keeper(database, large) == soon
        assert (await _won(database, late)).job.id in small
        assert await _keeper(database, large) == soon
        await _end(database, second)
        started = await _won(database, soon)
        assert (started.job.id, started.job.reserved_node_id) == (large, None)
        assert started.attempt.accelerators == ["card-0", "card-1"]

    async def test_job_with_a_limit_fills_the_gap(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(2))
        await add_job(database, limits={"seconds": 600})
        await _won(database, node)
        await add_job(database, resources={"accelerators": 2})
        await add_job(database, created_at=START + MINUTE)
        await add_job(database, limits={"seconds": 601}, created_at=START + 2 * MINUTE)
        short = await add_job(database, limits={"seconds": 600}, created_at=START + 3 * MINUTE)

        assert await claim(database, node) is None  # keeps for the large one
        assert (await _won(database, node)).job.id == short

    async def test_silent_or_draining_keeper_is_relieved(self, database: Database) -> None:
        keeper = await add_node(database, "a", accelerators=cards(2))
        for _ in range(2):
            await add_job(database)
        await _won(database, keeper)
        other = await add_node(database, "b", accelerators=cards(2))
        await _won(database, other)
        large = await add_job(database, resources={"accelerators": 2})
        await claim(database, keeper)
        assert await _keeper(database, large) == keeper

        await claim(database, other)
        assert await _keeper(database, large) == keeper
        await _change_node(database, keeper, draining_at=START)
        await claim(database, other)
        assert await _keeper(database, large) == other

        await _change_node(database, keeper, draining_at=None)
        later = START + 2 * MINUTE
        await _change_node(database, keeper, heartbeat_at=later)
        await claim(database, keeper, now=later)  # the other one was not heard of for two minutes
        assert await _keeper(database, large) == keeper

    async def test_cancelled_job_leaves_no_reservation(self, database: Database) -> None:
        node = await add_node(database, accelerators=cards(2))
        await add_job(database)
        await _won(database, node)
        large = await add_job(database, resources={"accelerators": 2})
        small = await add_job(database, created_at=START + MINUTE)
        assert await claim(database, node) is None
        assert await _keeper(database, large) == node

        async with database.writing() as session:
            await job_status.request_cancel(session, large, now=START)

        assert await _keeper(database, large) is None
        assert (await _won(database, node)).job.id == small

    async def test_racing_nodes_make_one_reservation(self, database: Database) -> None:
        nodes = [await add_node(database, f"node-{number}", accelerators=cards(2)) for number in range(4)]
        for node in nodes:
            await add_job(database)
            await _won(database, node)
        large = [await add_job(database, resources={"accelerators": 2}) for _ in range(2)]

        for _ in range(3):
            assert await asyncio.gather(*(claim(database, node) for node in nodes)) == [None] * 4

        assert [await _keeper(database, job_id) for job_id in sorted(large)] == [nodes[0], None]


class TestCost:
    async def test_a_few_hundred_demands_and_reservations_are_found_by_indexes(self, tmp_path: Path) -> None:
        database = Database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", scope=DEFAULT_SCOPE)
        await upgrade(database)
        node = await add_node(database, accelerators=cards(8))
        await add_node(database, "other", accelerators=cards(8))
        await _queue(database, max_live=1000)
        await insert(
            database,
            *(
                new_job(queue="q", submitted_by=f"user-{n % 300}", resources={"accelerators": 1 + n % 2})
                for n in range(600)
            ),
            new_job(resources={"accelerators": 8}, priority=-1, kind=JobKind.TRAINING),
        )
        await _won(database, node)
        said: list[tuple[str, Any]] = []
        sa.event.listen(
            database.engine.sync_engine,
            "before_cursor_execute",
            lambda _connection, _cursor, statement, parameters, *_: said.append((statement, parameters)),
        )
        await add_job(database, resources={"accelerators": 8}, priority=-1)
        said.clear()
        await claim(database, node)
        async with database.reading() as session:
            await claims.first_in_order(session, [JobKind.TRAINING, JobKind.SAVING], now=START, limit=10)
        looked = [one for one in said if one[0].startswith(("SELECT", "WITH", "UPDATE"))]

        async with database.engine.connect() as connection:
            plans = [
                row.detail
                for statement, parameters in looked
                for row in await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            ]
        await database.close()

        assert len(looked) < 20
        whole = ("SCAN job", "SCAN attempt", "SCAN lease", "ix_job_status_created")
        assert "SEARCH job USING INDEX ix_job_order (status=?)" in plans
        assert "USE TEMP B-TREE FOR ORDER BY" not in plans
        assert [plan for plan in plans if plan.startswith(whole) and "ix_job_queue" not in plan] == []
