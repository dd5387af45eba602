"""What other accounts of the machine can read of a home: nothing, whatever the umask."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.domain.projects import DEFAULT_SCOPE
from app.store.home import Home, NodeHome, close_to_others
from app.store.session import Database


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=lambda mask: f"umask_{mask:03o}")
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def write_to(database: Path) -> dict[str, int]:
    """Write to a SQLite database; return the modes of its files while it is open, by name."""
    opened = Database(f"sqlite+aiosqlite:///{database}", scope=DEFAULT_SCOPE)
    try:
        async with opened.writing() as session:
            connection = await session.connection()
            await connection.execute(sa.text("CREATE TABLE IF NOT EXISTS secret (value TEXT)"))
        return {file.name: mode(file) for file in database.parent.glob("deepe.db*")}
    finally:
        await opened.close()


@pytest.mark.usefixtures("_umask")
class TestModes:
    def test_new_homes_are_for_their_owner(self, tmp_path: Path) -> None:
        home, node = Home(tmp_path / "a" / "home"), NodeHome(tmp_path / "node")

        home.create()
        node.create()

        assert (mode(home.root), mode(node.root)) == (0o700, 0o700)

    async def test_database_and_its_neighbours_are_for_their_owner(self, tmp_path: Path) -> None:
        modes = await write_to(tmp_path / "deepe.db")

        assert modes == {"deepe.db": 0o600, "deepe.db-wal": 0o600, "deepe.db-shm": 0o600}

    @pytest.mark.parametrize(
        ("before", "after"), [(0o644, 0o600), (0o640, 0o600), (0o664, 0o660), (0o660, 0o660), (0o666, 0o660)]
    )
    async def test_existing_database_is_closed_but_stays_with_a_group_that_writes(
        self, tmp_path: Path, before: int, after: int
    ) -> None:
        path = tmp_path / "deepe.db"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE old (value TEXT)")
        connection.close()
        path.chmod(before)

        modes = await write_to(path)

        assert set(modes.values()) == {after}


class TestExistingHomes:
    def test_home_that_is_shared_on_purpose_keeps_its_mode(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o2770)

        Home(tmp_path).create()

        assert mode(tmp_path) == 0o2770

    @pytest.mark.parametrize(("folder", "after"), [(0o700, 0o600), (0o755, 0o600), (0o770, 0o640), (0o777, 0o600)])
    def test_licence_of_an_earlier_version_is_closed(self, tmp_path: Path, folder: int, after: int) -> None:
        home = Home(tmp_path)
        home.licence.write_text("{}")
        home.licence.chmod(0o644)
        tmp_path.chmod(folder)

        home.create()

        assert mode(home.licence) == after

    def test_file_that_is_closed_is_left_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch(mode=0o400)

        close_to_others(file)

        assert mode(file) == 0o400
