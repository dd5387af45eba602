"""What is old goes, once, and nothing else."""

import asyncio
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete
from sqlmodel import col, select

from app.domain.enums import DeliveryState, JobKind, JobStatus
from app.domain.retention import Retention, RetentionTarget
from app.domain.webhooks import DEFAULT_EVENTS
from app.executor.maintenance.housekeeping import EVERY, LEASE, Housekeeper, HousekeepingRunning
from app.executor.maintenance.webhooks import Webhooks
from app.presets.shared.helpers.deepe_addresses import AddressPolicy
from app.store import housekeeping as store
from app.store import webhooks
from app.store.home import Home
from app.store.session import Database
from app.store.tables import DeliveryRow, IdempotencyRow, InstallationRow
from tests.api.resources import insert_model
from tests.job_rows import START, add_job, add_method

DAY = timedelta(days=1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


def housekeeper(database: Database, home: Home, *, age: timedelta | None = DAY) -> Housekeeper:
    return Housekeeper(database=database, home=home, retention=Retention(dict.fromkeys(RetentionTarget, age)))


async def ended(
    database: Database, home: Home, status: JobStatus, *, kind: JobKind = JobKind.TRAINING, at: datetime = START
) -> Path:
    """Insert an ended job with a run folder of 5 bytes and return the folder."""
    job_id = await add_job(database, kind=kind, status=status, finished_at=at)
    folder = home.runs / job_id
    write(folder / "1" / "output.log")
    return folder


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("hello")
    return path


async def counts(keeper: Housekeeper, *, dry_run: bool = False) -> Mapping[str, tuple[int, int]]:
    found = await (keeper.preview() if dry_run else keeper.run())
    return {entry.target.value: (entry.count, entry.size_bytes) for entry in found if entry.count}


class TestRuns:
    async def test_removes_old_runs_and_says_before_what_would_go(self, database: Database, home: Home) -> None:
        failed = await ended(database, home, JobStatus.FAILED)
        question = await ended(database, home, JobStatus.SUCCEEDED, kind=JobKind.INFERENCE_CUSTOMIZED)
        fresh = await ended(database, home, JobStatus.FAILED, at=datetime.now(UTC))
        succeeded = await ended(database, home, JobStatus.SUCCEEDED, kind=JobKind.SAVING)
        queued = await ended(database, home, JobStatus.QUEUED)
        stranger = write(home.runs / "not-a-job" / "file").parent
        keeper = housekeeper(database, home)

        would = await counts(keeper, dry_run=True)
        assert failed.exists()
        went = await counts(keeper)
        again = await counts(keeper)

        assert would == went == {"failed_runs": (1, 5), "question_runs": (1, 5)}
        assert again == {}
        assert not failed.exists()
        assert not question.exists()
        assert all(folder.exists() for folder in (fresh, succeeded, queued, stranger))

    async def test_keeps_what_an_unfinished_job_repeats(self, database: Database, home: Home) -> None:
        failed = await ended(database, home, JobStatus.FAILED)
        await add_job(database, retry_of=failed.name)

        assert await counts(housekeeper(database, home)) == {}
        assert failed.exists()

    async def test_keeps_the_checkpoint_that_a_retry_of_a_retry_goes_on_from(
        self, database: Database, home: Home
    ) -> None:
        first = await ended(database, home, JobStatus.FAILED)
        second = await ended(database, home, JobStatus.FAILED)
        other = await ended(database, home, JobStatus.FAILED)
        await add_job(database, retry_of=second.name, launch={"resume_of": first.name})

        assert await counts(housekeeper(database, home)) == {"failed_runs": (1, 5)}
        assert (first.exists(), second.exists(), other.exists()) == (True, True, False)

    async def test_keeps_everything_for_ever_where_no_age_is_set(self, database: Database, home: Home) -> None:
        await ended(database, home, JobStatus.FAILED)

        assert await counts(housekeeper(database, home, age=None)) == {}

    async def test_removes_checkpoints_beside_a_model_only(self, database: Database, home: Home) -> None:
        run = await ended(database, home, JobStatus.SUCCEEDED)
        model = write(run / "1" / "output" / "adapter.safetensors")
        checkpoint = write(run / "1" / "output" / "checkpoint-10" / "optimizer.pt").parent
        of_a_model = write(run / "1" / "output" / "checkpoint-20" / "model.safetensors").parent
        method_id = await add_method(database)
        await insert_model(database, method_id=method_id, path=home.relative(of_a_model))

        went = await counts(housekeeper(database, home))

        assert went == {"checkpoints": (1, 5)}
        assert model.exists()
        assert of_a_model.exists()
        assert not checkpoint.exists()

    async def test_keeps_the_folder_of_a_living_model_whatever_became_of_the_job(
        self, database: Database, home: Home
    ) -> None:
        run = await ended(database, home, JobStatus.FAILED)
        await insert_model(database, method_id=await add_method(database), path=f"runs/{run.name}/1/output")

        assert await counts(housekeeper(database, home)) == {}
        assert run.exists()

    async def test_follows_no_link(self, database: Database, home: Home, tmp_path: Path) -> None:
        outside = write(tmp_path / "outside" / "precious").parent
        failed = await ended(database, home, JobStatus.FAILED)
        (failed / "1" / "link").symlink_to(outside)
        linked = await add_job(database, status=JobStatus.FAILED, finished_at=START)
        (home.runs / linked).symlink_to(outside)
        old_log = home.logs / "link.jsonl"
        old_log.symlink_to(outside / "precious")
        succeeded = await ended(database, home, JobStatus.SUCCEEDED)
        (succeeded / "1" / "checkpoint-1").symlink_to(outside)

        await counts(housekeeper(database, home))

        assert not failed.exists()
        assert (outside / "precious").read_text() == "hello"
        assert (home.runs / linked).is_symlink()
        assert old_log.is_symlink()


class TestLogsAndRows:
    async def test_removes_log_files_that_nobody_writes_any_more(self, database: Database, home: Home) -> None:
        old, fresh, other = (write(home.logs / name) for name in ("a.jsonl", "b.jsonl", "c.txt"))
        for path in (old, other):
            os.utime(path, (START.timestamp(), START.timestamp()))

        assert await counts(housekeeper(database, home)) == {"script_logs": (1, 5)}
        assert (old.exists(), fresh.exists(), other.exists()) == (False, True, True)

    async def test_removes_messages_that_are_through_and_old_keys(self, database: Database, home: Home) -> None:
        async with database.writing() as session:
            webhook = await Webhooks(policy=AddressPolicy.ANY).create(
                session, url="http://example.com", events=DEFAULT_EVENTS, active=True, secret=None
            )
            for state in DeliveryState:
                (await webhooks.add_test(session, webhook, "webhook.test", now=START)).state = state
            key = IdempotencyRow(scope="s", key="k", fingerprint="f", status_code=201, body={}, created_at=START)
            session.add(key)
        keeper = housekeeper(database, home)

        would = await counts(keeper, dry_run=True)
        went = await counts(keeper)

        assert would == went == {"deliveries": (2, 0), "idempotency_keys": (1, 0)}
        async with database.reading() as session:
            assert (await session.exec(select(DeliveryRow.state))).all() == [DeliveryState.PENDING]


class TestTurn:
    async def test_of_two_at_once_one_keeps_house(self, database: Database, home: Home) -> None:
        runs = [await ended(database, home, JobStatus.FAILED) for _ in range(5)]
        keepers = [housekeeper(database, home) for _ in range(4)]

        results = await asyncio.gather(*(keeper.run() for keeper in keepers), return_exceptions=True)

        assert all(isinstance(result, (list, HousekeepingRunning)) for result in results)
        removed = sum(entry.count for result in results if isinstance(result, list) for entry in result)
        assert removed == len(runs)

    async def test_a_holder_that_died_gives_the_turn_up_by_its_lease(self, database: Database, home: Home) -> None:
        async with database.writing() as session:
            assert await store.take_turn(session, "dies", lease=LEASE, unasked=True)

        with pytest.raises(HousekeepingRunning):
            await housekeeper(database, home).run()
        async with database.writing() as session:
            await session.exec(delete(InstallationRow).where(col(InstallationRow.key) == store.TURN_KEY))
            assert await store.take_turn(session, "dies", lease=-LEASE, unasked=True)
        await housekeeper(database, home).run()

        async with database.writing() as session:
            assert not await store.keep_turn(session, "dies", lease=LEASE)

    async def test_is_not_due_again_at_once_unless_asked_for(self, database: Database, home: Home) -> None:
        keeper = housekeeper(database, home)
        await keeper.run()

        async with database.writing() as session:
            assert not await store.take_turn(session, "another", lease=EVERY, unasked=True)
        await keeper.run()
