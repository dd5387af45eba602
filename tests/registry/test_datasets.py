"""Data sets in use: what was edited on disk is noticed, checked again, and recorded."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.domain.projects import DEFAULT_SCOPE
from app.registry.datasets.service import DatasetMissing, Datasets, InvalidDataset
from app.store.datasets import get_dataset
from app.store.home import Home
from app.store.session import Database
from app.store.tables import DatasetRow

LINE = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    database = Database(sqlite_url, scope=DEFAULT_SCOPE)
    yield database
    await database.close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def datasets(home: Home) -> Datasets:
    return Datasets(home=home, max_characters=100, max_bytes=2**30, clock=lambda: datetime.now(UTC))


async def registered(database: Database, datasets: Datasets, home: Home) -> tuple[DatasetRow, Path]:
    file = home.datasets / "faq.jsonl"
    file.write_bytes(LINE)
    prepared = await datasets.prepare(name="faq", path="faq.jsonl")
    async with database.writing() as session:
        return await datasets.create(session, prepared), file


class TestCurrent:
    async def test_says_nothing_if_the_bytes_are_the_same(
        self, database: Database, datasets: Datasets, home: Home
    ) -> None:
        row, file = await registered(database, datasets, home)
        file.write_bytes(LINE)

        assert datasets.current(row) is None

    async def test_notices_an_edit_that_keeps_size_and_time(
        self, database: Database, datasets: Datasets, home: Home
    ) -> None:
        row, file = await registered(database, datasets, home)
        assert datasets.current(row) is None
        before = file.stat()

        file.write_bytes(LINE.replace(b'"b"', b'"c"'))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        found = datasets.current(row)

        assert found is not None
        assert found.digest != row.digest

    async def test_refuses_what_became_invalid_with_its_lines(
        self, database: Database, datasets: Datasets, home: Home
    ) -> None:
        row, file = await registered(database, datasets, home)
        file.write_bytes(LINE + b"broken\n")

        with pytest.raises(InvalidDataset, match="faq") as caught:
            datasets.current(row)

        assert [problem.pointer for problem in caught.value.violations()] == ["/lines/2"]

    async def test_says_that_the_file_is_gone(self, database: Database, datasets: Datasets, home: Home) -> None:
        row, file = await registered(database, datasets, home)
        file.unlink()

        with pytest.raises(DatasetMissing, match=r"datasets/faq\.jsonl"):
            datasets.current(row)


class TestRefresh:
    async def test_records_the_new_content(self, database: Database, datasets: Datasets, home: Home) -> None:
        _, file = await registered(database, datasets, home)
        file.write_bytes(b'{"q": 1}\n' * 3)

        async with database.writing() as session:
            changed = await datasets.refresh(session, await get_dataset(session, "faq"))
        async with database.writing() as session:
            row = await get_dataset(session, "faq")
            again = await datasets.refresh(session, row)

        assert (changed, again) == (True, False)
        assert (row.rows, row.columns, row.size_bytes) == (3, ["q"], 27)
