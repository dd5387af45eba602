"""`deepe secrets`: values come from stdin, keys are replaced where the home is."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.access.secrets import SecretKeys, Secrets, secret_values
from app.cli import app
from app.domain.access import LOCAL
from app.domain.projects import DEFAULT_SCOPE
from app.store.migrate import upgrade
from app.store.session import Database
from tests.cli.standin import Answer, Request, document, stand_in

VALUE = "correct horse battery"
ROW = {"name": "hub", "reference": "secret://hub", "changed_by": "ada", "changed_at": "2026-12-01T00:00:00Z"}


def answers(request: Request) -> Answer:
    if request.path.startswith("/api/v1/secrets?"):
        return document({"items": [ROW], "next_cursor": None})
    return Answer(204) if request.method == "DELETE" else document(ROW)


def test_values_come_from_stdin() -> None:
    runner = CliRunner()
    with stand_in(answers) as (url, asked):
        told = runner.invoke(app, ["secrets", "set", "hub", "--url", url], input=f"{VALUE}\n")
        listed = runner.invoke(app, ["secrets", "list", "--url", url])
        runner.invoke(app, ["secrets", "delete", "hub", "--url", url])

    assert "secret://hub" in told.stdout
    assert "secret://hub" in listed.stdout
    assert VALUE not in told.output
    put = next(one for one in asked if one.method == "PUT")
    assert (put.path, json.loads(put.body), put.headers["if-match"]) == ("/api/v1/secrets/hub", {"value": VALUE}, "*")
    assert asked[-1].method == "DELETE"


def test_rotation_encrypts_anew_and_forgets_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPE_HOME", str(tmp_path))
    keys = SecretKeys(tmp_path / "secrets.key")

    async def stored(*, put: bool = False) -> str:
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/deepe.db", scope=DEFAULT_SCOPE)
        if put:
            await upgrade(database)
            async with database.writing() as session:
                service = Secrets(keys, clock=lambda: datetime.now(UTC))
                await service.put(session, "hub", VALUE, by=LOCAL, check=lambda _: None)
        async with database.reading() as session:
            found = await secret_values(session, keys, ["hub"])
        await database.close()
        return found["hub"]

    asyncio.run(stored(put=True))
    before = keys.read()
    told = CliRunner().invoke(app, ["secrets", "rotate-key", "--json"])
    kept = keys.read()
    forgotten = CliRunner().invoke(app, ["secrets", "rotate-key", "--forget", "--json"])

    assert json.loads(told.stdout) == {"encrypted": 1, "keys": 2}
    assert kept[1:] == before
    assert json.loads(forgotten.stdout) == {"encrypted": 1, "keys": 1}
    assert not {*keys.read()} & {*kept}
    assert asyncio.run(stored()) == VALUE
