"""A backup holds what it says, from either database and into either; a damaged one changes nothing."""

import asyncio
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlmodel import col, select

from app.access.audit import verify
from app.access.secrets import SecretKeys, Secrets, secret_values
from app.domain.access import LOCAL
from app.domain.enums import EndReason, JobStatus, ModelState
from app.domain.projects import DEFAULT_SCOPE
from app.domain.webhooks import DEFAULT_EVENTS
from app.executor.maintenance.backups import BackupPart, BackupReport, BackupUnusable, take
from app.executor.maintenance.restoring import check, restore
from app.executor.maintenance.webhooks import Webhooks
from app.executor.runs.redaction import begin
from app.executor.runs.run_folder import RunFolder
from app.presets.shared.helpers.deepe_addresses import AddressPolicy
from app.store import dump, job_attempts, webhooks
from app.store.home import Home
from app.store.migrate import SchemaState, downgrade, revisions, schema_state, upgrade
from app.store.session import Database
from app.store.tables import AttemptRow, JobRow, LeaseRow, WebhookRow
from tests.api.resources import insert_model
from tests.databases import execute
from tests.job_rows import START, SUCCESS, add_method, add_node, cards, claim, insert, new_chain, new_job
from tests.servers import postgres_url

STRANGE = 'line\nbreak, "quote", 中文, 𝄞, \\u0000'
UNCHANGED = ("method", "method_version", "model", "base_model", "dataset", "delivery")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    (home.scripts / "own").mkdir()
    (home.scripts / "own" / "train.py").write_text("print('mine')\n")
    (home.scripts / "own" / "train.py").chmod(0o755)
    (home.scripts / "linked.py").symlink_to(home.scripts / "own" / "train.py")
    (home.versions / "ab").mkdir()
    (home.versions / "ab" / "abcd").write_bytes(bytes(range(256)))
    home.licence.write_text("{}")
    (home.datasets / "rows.jsonl").write_text('{"text": "a"}\n')
    return home


@pytest.fixture
def empty_sqlite(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/restored.sqlite"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres])])
def empty_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a database without tables, once of each kind."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("empty_sqlite"))
    server, name = request.getfixturevalue("postgres_server"), f"restored_{uuid4().hex}"
    asyncio.run(execute(server, f'CREATE DATABASE "{name}"'))
    return postgres_url(server, name)


@pytest.fixture
async def empty(empty_url: str) -> AsyncIterator[Database]:
    database = Database(empty_url, scope=DEFAULT_SCOPE)
    yield database
    await database.close()


async def fill(database: Database) -> None:
    """Insert a running job with a lease, a chain that waits, a model with its parent, a webhook with a message."""
    method = await add_method(database, description=STRANGE)
    node = await add_node(database, accelerators=cards(2), labels={"room": STRANGE})
    first = await insert_model(database, method_id=method, details={"loss": 0.1, "big": 2**60, "none": None})
    await insert_model(database, method_id=method, parent_id=first, state=ModelState.COMPLETE)
    async with database.writing() as session:
        hook = await Webhooks(policy=AddressPolicy.ANY).create(
            session, url="https://example.com/hook", events=DEFAULT_EVENTS, active=True, secret=None
        )
        await webhooks.add_test(session, hook, "webhook.test", now=START)
    await insert(database, new_job(resources={"accelerators": 1}), *new_chain(method_id=method))
    assert await claim(database, node) is not None


async def lines(database: Database) -> dict[str, list[str]]:
    """Return the rows of each table."""
    found: dict[str, list[str]] = {}
    async with dump.snapshot(database) as connection:
        async for line in dump.dump(connection):
            said = json.loads(line)
            if isinstance(said, dict):
                names, rows = said["columns"], found.setdefault(said["table"], [])
            else:
                rows.append(json.dumps(dict(zip(names, said, strict=True)), sort_keys=True))
    return found


async def taken(database: Database, home: Home, file: Path, *parts: BackupPart) -> BackupReport:
    return await take(database, home, file, parts=parts, product="1.2.3")


class TestRoundTrip:
    async def test_brings_all_rows_and_files_back(
        self, database: Database, home: Home, empty: Database, tmp_path: Path
    ) -> None:
        await fill(database)
        new, file = Home(tmp_path / "new"), tmp_path / "backup.tar.gz"

        written = await taken(database, home, file, BackupPart.DATASETS)
        report = await restore(empty, new, file)

        before, after = await lines(database), await lines(empty)
        assert before.keys() == after.keys()
        assert {name: after[name] for name in UNCHANGED} == {name: before[name] for name in UNCHANGED}
        assert sum(written.rows.values()) == sum(report.rows.values()) == sum(map(len, before.values()))
        assert after["audit_record"][:-1] == before["audit_record"]
        trail = await verify(empty, expected=json.loads(before["audit_record"][-1])["hash"])
        assert (trail.sound, trail.records) == (True, len(before["audit_record"]) + 1)
        restored = json.loads(after["audit_record"][-1])
        assert (restored["operation"], restored["caller_kind"]) == ("restore", "command")
        assert written.files == report.files == 5
        assert (new.scripts / "own" / "train.py").read_text() == "print('mine')\n"
        assert os.access(new.scripts / "own" / "train.py", os.X_OK)
        assert (new.scripts / "linked.py").read_text() == "print('mine')\n"
        assert (new.versions / "ab" / "abcd").read_bytes() == bytes(range(256))
        assert (new.datasets / "rows.jsonl").read_text() == '{"text": "a"}\n'
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert list(tmp_path.glob(".backup*")) == []

    async def test_ends_what_had_not_ended_and_lets_it_tell_nobody(
        self, database: Database, home: Home, empty: Database, tmp_path: Path
    ) -> None:
        await fill(database)
        await taken(database, home, tmp_path / "backup.tar")

        report = await restore(empty, Home(tmp_path / "new"), tmp_path / "backup.tar")

        async with empty.reading() as session:
            ended = (await session.exec(select(JobRow).where(col(JobRow.reason).is_not(None)))).all()
            live = (await session.exec(select(AttemptRow).where(AttemptRow.live))).all()
            leases = (await session.exec(select(LeaseRow).where(LeaseRow.live))).all()
            hooks = (await session.exec(select(WebhookRow))).all()
        restored = [job for job in ended if job.reason is EndReason.INSTALLATION_RESTORED]
        assert report.ended_jobs == len(restored) == 4
        assert {job.status for job in restored} == {JobStatus.FAILED}
        assert not any(job.blocked_by for job in restored)
        assert (list(live), list(leases)) == ([], [])
        assert [hook.active for hook in hooks] == [False]
        assert report.webhooks_off == 1

    async def test_says_which_secrets_need_another_key_and_takes_no_key_along(
        self, database: Database, home: Home, empty: Database, tmp_path: Path
    ) -> None:
        keys = SecretKeys(home.secrets_key)
        async with database.writing() as session:
            secrets = Secrets(keys, clock=lambda: START)
            await secrets.put(session, "hub", "correct horse battery", by=LOCAL, check=lambda _: None)
        run = RunFolder(home.run_folder("j", 1))
        run.path.mkdir(parents=True)
        begin(run, ["correct horse battery"])
        run.parameters.write_text("correct horse battery")
        file, new = tmp_path / "backup.tar", Home(tmp_path / "new")

        written = await taken(database, home, file, *BackupPart)
        report = await restore(empty, new, file)

        assert any("runs/j/1" in left for left in written.left_out)
        assert b"correct horse battery" not in file.read_bytes()
        assert (report.unreadable_secrets, new.secrets_key.exists()) == (["hub"], False)
        async with empty.reading() as session:
            assert await secret_values(session, keys, ["hub"]) == {"hub": "correct horse battery"}

    async def test_new_rows_are_numbered_on(
        self, database: Database, home: Home, empty: Database, tmp_path: Path
    ) -> None:
        await fill(database)
        await taken(database, home, tmp_path / "backup.tar")
        await restore(empty, Home(tmp_path / "new"), tmp_path / "backup.tar")

        job_id = (await insert(empty, new_job()))[0]
        node = await add_node(empty)  # another machine of the same name
        won = await claim(empty, node)
        assert won is not None
        assert won.job.id == job_id
        async with empty.writing() as session:
            assert await job_attempts.finish(session, won, SUCCESS, now=START)

    async def test_names_what_the_database_has_and_the_backup_has_not(
        self, database: Database, home: Home, empty_sqlite: str, tmp_path: Path
    ) -> None:
        await fill(database)
        await taken(database, home, tmp_path / "backup.tar")
        target = Database(empty_sqlite, scope=DEFAULT_SCOPE)

        report = await restore(target, Home(tmp_path / "new"), tmp_path / "backup.tar")

        await target.close()
        assert len(report.missing) == 2
        assert all(path.startswith("runs/") for path in report.missing)

    async def test_takes_the_results_of_models_without_the_runs_of_others(
        self, database: Database, home: Home, tmp_path: Path
    ) -> None:
        await fill(database)
        async with dump.snapshot(database) as connection:
            path = (await connection.execute(sa.text("SELECT path FROM model"))).scalars().first()
        for folder in (home.absolute(str(path)), home.runs / "other"):
            folder.mkdir(parents=True)
            (folder / "weights").write_bytes(b"w")

        await taken(database, home, tmp_path / "backup.tar", BackupPart.MODELS)

        with tarfile.open(tmp_path / "backup.tar") as archive:
            names = archive.getnames()
        assert f"home/{path}/weights" in names
        assert "home/runs/other/weights" not in names

    async def test_does_not_take_itself(self, database: Database, home: Home) -> None:
        target = home.scripts / "all.tar"

        await taken(database, home, target)
        await taken(database, home, target)

        with tarfile.open(target) as archive:
            assert not [name for name in archive.getnames() if "all.tar" in name]
        check(target)

    async def test_restores_what_an_older_version_wrote(self, empty: Database, tmp_path: Path) -> None:
        old = Database(f"sqlite+aiosqlite:///{tmp_path}/old.sqlite", scope=DEFAULT_SCOPE)
        await upgrade(old)
        await fill(old)
        await downgrade(old, revision=revisions()[-3])
        rows = [line async for line in _dumped(old)]
        await old.close()

        async with dump.restored(empty, rows, revision=revisions()[-3]) as (_, counts):
            assert counts["job"] == 6

        assert await schema_state(empty) is SchemaState.CURRENT


async def _dumped(database: Database) -> AsyncIterator[str]:
    async with dump.snapshot(database) as connection:
        async for line in dump.dump(connection):
            yield line


class TestRefused:
    @pytest.fixture
    async def file(self, sqlite_url: str, home: Home, tmp_path: Path) -> Path:
        database = Database(sqlite_url, scope=DEFAULT_SCOPE)
        await fill(database)
        await taken(database, home, tmp_path / "whole.tar")
        await database.close()
        return tmp_path / "whole.tar"

    @pytest.mark.parametrize("keep", [0, 100, 600, 5_000, -20_000])
    def test_cut(self, file: Path, keep: int) -> None:
        file.write_bytes(file.read_bytes()[:keep])

        with pytest.raises(BackupUnusable):
            check(file)

    def test_changed(self, file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content.replace(b"print('mine')", b"print('evil')", 1))

        with pytest.raises(BackupUnusable, match=r"scripts/linked\.py"):
            check(file)

    @pytest.mark.parametrize(
        "name", ["home/../../etc/passwd", "/etc/passwd", "home/scripts/../../x", "home/elsewhere/x", "other.txt"]
    )
    def test_names_that_we_do_not_write(self, file: Path, name: str) -> None:
        with tarfile.open(file, "a") as archive:
            _add(archive, name, b"x")

        with pytest.raises(BackupUnusable, match="no backup of ours"):
            check(file)

    def test_a_link(self, file: Path) -> None:
        with tarfile.open(file, "a") as archive:
            info = tarfile.TarInfo("home/scripts/x")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)

        with pytest.raises(BackupUnusable, match="no backup of ours"):
            check(file)

    @pytest.mark.parametrize("change", [{"schema_revision": "9999"}, {"format": 2}])
    def test_of_a_newer_version(self, file: Path, tmp_path: Path, change: dict[str, Any]) -> None:
        newer = tmp_path / "newer.tar"
        with tarfile.open(file) as old, tarfile.open(newer, "w") as archive:
            for info, content in _members(old):
                said = json.dumps(json.loads(content) | change).encode() if info.name == "backup.json" else content
                _add(archive, info.name, said)

        with pytest.raises(BackupUnusable, match="newer version"):
            check(newer)

    async def test_into_a_home_or_database_that_is_in_use(
        self, file: Path, home: Home, sqlite_url: str, empty_sqlite: str, tmp_path: Path
    ) -> None:
        used, unused = Database(sqlite_url, scope=DEFAULT_SCOPE), Database(empty_sqlite, scope=DEFAULT_SCOPE)

        with pytest.raises(BackupUnusable, match="in use already"):
            await restore(used, Home(tmp_path / "new"), file)
        with pytest.raises(BackupUnusable, match="is there already"):
            await restore(unused, home, file)

        await used.close()
        await unused.close()
        assert not any((tmp_path / "new").iterdir())

    async def test_beside_another_restore(self, file: Path, empty_sqlite: str, tmp_path: Path) -> None:
        database, new = Database(empty_sqlite, scope=DEFAULT_SCOPE), Home(tmp_path / "new")
        (new.root / ".restoring").mkdir(parents=True)

        with pytest.raises(BackupUnusable, match="another restore"):
            await restore(database, new, file)

        await database.close()
        assert [path.name for path in new.root.iterdir()] == [".restoring"]

    async def test_rows_that_the_database_refuses_leave_nothing(
        self, file: Path, empty: Database, tmp_path: Path
    ) -> None:
        with tarfile.open(file) as old:
            whole = {info.name: content for info, content in _members(old)}
        rows = whole["database.jsonl"].replace(b'"running"', b"null").replace(b'"launching"', b"null")
        assert rows != whole["database.jsonl"]
        digests = json.dumps({**json.loads(whole["digests.json"]), "database.jsonl": _sha256(rows)}).encode()
        broken = tmp_path / "broken.tar"
        with tarfile.open(broken, "w") as archive:
            for name, content in {**whole, "database.jsonl": rows, "digests.json": digests}.items():
                _add(archive, name, content)

        with pytest.raises(BackupUnusable, match="rows cannot be read") as refused:
            await restore(empty, Home(tmp_path / "new"), broken)

        assert "INSERT" not in str(refused.value)  # with it would come the rows

        assert await schema_state(empty) is SchemaState.MISSING
        assert not any((tmp_path / "new").iterdir())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for info in archive:
        content = archive.extractfile(info)
        assert content is not None
        yield info, content.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
