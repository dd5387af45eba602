"""`deepe audit`: list, export, and verification of the database and of an export."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.api.schemas.audit import audit_record_read
from app.cli import app
from app.domain.audit import Action, acting
from app.domain.projects import EVERY_PROJECT
from app.store import audit_records
from app.store.migrate import upgrade
from app.store.session import Database
from app.store.tables import QueueRow
from tests.cli.standin import Answer, Request, document, stand_in

RECORD = {
    "number": 7,
    "at": "2026-12-01T00:00:00Z",
    "caller": "ada",
    "address": "10.0.0.9",
    "operation": "set_queue_limits",
    "details": {"things": [{"kind": "queue", "id": "night", "name": "night", "done": "changed"}]},
}


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["audit", *words])


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Return the lines of an export of five records; the database of the settings holds them, too."""
    monkeypatch.setenv("DEEPE_HOME", str(tmp_path))

    async def write() -> Sequence[str]:
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/deepe.db", scope=EVERY_PROJECT)
        await upgrade(database)
        now = datetime.now(UTC)
        with acting(Action("key", "ada", "key:1", "set_queue_limits")):
            for number in range(1, 6):
                async with database.writing() as session:
                    await session.merge(QueueRow(name="nacht-ü", max_live=number, created_at=now, updated_at=now))
        async with database.reading() as session:
            rows = await audit_records.batch(session, after=0)
        await database.close()
        return [audit_record_read(row).model_dump_json() for row in rows]

    return asyncio.run(write())


def change(home: Path, statement: str) -> None:
    async def work() -> None:
        import sqlalchemy as sa

        database = Database(f"sqlite+aiosqlite:///{home}/deepe.db", scope=EVERY_PROJECT)
        async with database.writing() as session:
            await (await session.connection()).execute(sa.text(statement))
        await database.close()

    asyncio.run(work())


def test_lists_and_exports(tmp_path: Path) -> None:
    def answers(request: Request) -> Answer:
        if request.path.startswith("/api/v1/audit:export"):
            return Answer(200, b'{"number": 7}\n', "application/jsonl")
        return document({"items": [RECORD], "next_cursor": None})

    file = tmp_path / "audit.jsonl"
    with stand_in(answers) as (url, asked):
        listed = run("list", "--caller", "ada", "--url", url)
        as_json = run("list", "--json", "--url", url)
        exported = run("export", str(file), "--since", "2026-12-01T00:00:00Z", "--url", url)
        again = run("export", str(file), "--url", url)

    assert "set_queue_limits" in listed.stdout
    assert "queue night" in listed.stdout
    assert "caller=ada" in asked[0].path
    assert json.loads(as_json.stdout) == {"items": [RECORD]}
    assert (exported.exit_code, file.read_text()) == (0, '{"number": 7}\n')
    assert "since=2026-12-01" in asked[2].path
    assert again.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["audit.jsonl"]


def test_verifies_the_database(exported: Sequence[str], tmp_path: Path) -> None:
    whole = run("verify", "--json")
    newest = json.loads(whole.stdout)["hash"]
    kept = run("verify", "--expect", newest)
    change(tmp_path, "UPDATE audit_record SET caller = 'bob' WHERE number = 3")
    changed = run("verify", "--json")

    assert (whole.exit_code, kept.exit_code) == (0, 0)
    assert kept.stdout == f"5 records, 1 to 5: whole.\n{newest}\n"
    assert changed.exit_code == 1
    assert json.loads(changed.stdout)["problems"][0]["number"] == 3
    assert run("verify", "--expect", "abc").exit_code == 2


def wrong_file(tmp_path: Path, lines: Sequence[str], *words: str) -> str:
    """Return what is said of a wrong export."""
    file = tmp_path / "audit.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    found = run("verify", "--file", str(file), *words)
    assert found.exit_code == 1, found.output
    return " ".join(found.output.split())


def test_verifies_an_export(exported: Sequence[str], tmp_path: Path) -> None:
    file = tmp_path / "whole.jsonl"
    file.write_text("\n".join(exported) + "\n", "utf-8")
    newest = json.loads(exported[-1])["hash"]

    assert run("verify", "--file", str(file)).exit_code == 0
    assert run("verify", "--file", str(file), "--expect", newest).exit_code == 0

    one, two, three, four, five = exported
    assert "Record 3 is missing" in wrong_file(tmp_path, [one, two, four, five])
    assert "Record 4" in wrong_file(tmp_path, [one, two, three, four.replace("ada", "bob"), five])
    assert "Record 2" in wrong_file(tmp_path, [one, three, two, four, five])
    assert "before 2 are missing" in wrong_file(tmp_path, [two, three, four, five])
    assert "Where record 3 is expected" in wrong_file(tmp_path, [one, two, "{}", three, four, five])
    assert "expected hash" in wrong_file(tmp_path, [one, two, three, four], "--expect", newest)
    assert "holds no records" in wrong_file(tmp_path, [])
