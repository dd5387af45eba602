"""`deepe audit`: the audit trail."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.client import Api
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, HomeFolder, Limit, Misused, Url
from app.cli.output import print_json, print_table, write

if TYPE_CHECKING:
    from app.domain.audit import Verification, Verifier

app = typer.Typer(no_args_is_help=True, help="The audit trail: who changed what, and which code was started.")

Caller = Annotated[str | None, typer.Option("--caller", help="Name or principal of the caller.")]
Kind = Annotated[str | None, typer.Option("--kind", help="change, action, launch, refusal or removal.")]
Operation = Annotated[str | None, typer.Option("--operation", help="Operation id, such as set_queue_limits.")]
Thing = Annotated[str | None, typer.Option("--thing", help="Id or name of what was changed.")]
Since = Annotated[str | None, typer.Option("--since", help="From this time on, such as 2026-12-01T00:00:00Z.")]
Until = Annotated[str | None, typer.Option("--until", help="Before this time.")]
_SHOWN_THINGS = 3


@app.command("list")
def list_records(
    caller: Caller = None,
    kind: Kind = None,
    operation: Operation = None,
    thing: Thing = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 50,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the records, newest first."""
    wanted = _wanted(caller, kind, operation, thing, since, until)
    with Api(url) as api:
        found = list(api.items("/audit", wanted, limit=limit))
    if as_json:
        print_json({"items": found})
        return
    rows = [
        (one["number"], one["at"], one["caller"], one["address"] or "", one["operation"], _things(one)) for one in found
    ]
    print_table(("number", "time", "caller", "address", "operation", "things"), rows, nothing="No records.")


@app.command("export")
def export_records(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.", dir_okay=False)],
    caller: Caller = None,
    kind: Kind = None,
    operation: Operation = None,
    thing: Thing = None,
    since: Since = None,
    until: Until = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write the records to a file, a JSON document on each line, oldest first."""
    if file.exists():
        raise Misused(f"{file} exists already.")
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    try:
        with Api(url) as api:
            api.fetch("/audit:export", part, start=0, params=_wanted(caller, kind, operation, thing, since, until))
        part.rename(file)
    except OSError as error:
        raise CliFailure(f"{file}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


@app.command("verify")
def verify_records(
    file: Annotated[
        Path | None, typer.Option("--file", help="What was exported whole; without one, the database.", dir_okay=False)
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="HASH", help="A hash that was printed before: no record with it, no success."),
    ] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Compare every record with its hash and with the one before; exit status 1 if something is wrong.

    Without a file it reads the database by itself, where the service is configured.
    """
    from app.api.schemas.audit import audit_verification
    from app.domain.texts import DEFAULT_LANGUAGE

    if expect is not None and (len(expect) != 64 or not set(expect) <= set("0123456789abcdef")):
        raise Misused("A hash has 64 digits and letters from a to f.")
    found = _verify_file(file, expect) if file is not None else _verify_database(home, expect)
    shown = audit_verification(found, DEFAULT_LANGUAGE)
    if as_json:
        print_json(shown.model_dump(mode="json"))
    elif shown.sound:
        write(f"{shown.records} records, {shown.first} to {shown.last}: whole.\n{shown.hash}\n")
    if not shown.sound:
        left = shown.problem_count - len(shown.problems)
        notes = [*(one.detail for one in shown.problems[1:]), *([f"{left} more."] if left else [])]
        raise CliFailure(shown.problems[0].detail, notes=notes)


def _verify_file(file: Path, expect: str | None) -> "Verification":
    from app.domain.audit import Verifier

    verifier = Verifier(expected=expect)
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                _take(verifier, line)
    except OSError as error:
        raise CliFailure(f"{file}: {error.strerror}") from None
    found = verifier.finish(None)
    if not found.records and found.sound:
        raise CliFailure(f"{file} holds no records.")
    return found


def _take(verifier: "Verifier", line: str) -> None:
    from pydantic import ValidationError

    from app.api.schemas.audit import AuditRecordRead, kept_record

    try:
        record = kept_record(AuditRecordRead.model_validate_json(line))
    except (ValidationError, ValueError):
        verifier.unreadable()
    else:
        verifier.take([record])


def _verify_database(home: Path | None, expect: str | None) -> "Verification":
    from app.access.audit import verify
    from app.cli.service import load
    from app.domain.projects import EVERY_PROJECT
    from app.store.migrate import DatabaseUnusable, SchemaState, schema_state
    from app.store.session import Database, DatabaseUnreachable

    settings = load(home=home)

    async def work() -> "Verification":
        database = Database(settings.database_url, scope=EVERY_PROJECT)
        try:
            if await schema_state(database) is not SchemaState.CURRENT:
                raise CliFailure("The database has no audit trail of this version yet. Start the service first.")
            return await verify(database, expected=expect)
        finally:
            await database.close()

    try:
        return asyncio.run(work())
    except DatabaseUnusable as error:
        raise CliFailure(str(error), notes=[error.advice]) from None
    except DatabaseUnreachable as error:
        raise CliFailure(f"The database does not answer: {error}.") from None


def _wanted(
    caller: str | None, kind: str | None, operation: str | None, thing: str | None, since: str | None, until: str | None
) -> Mapping[str, Any]:
    return {
        "caller": caller, "kind": kind, "operation": operation, "thing": thing, "since": since, "until": until,
    }  # fmt: skip


def _things(record: Mapping[str, Any]) -> str:
    return ", ".join(_named(record["details"]["things"]))


def _named(things: list[Mapping[str, Any]]) -> Iterator[str]:
    for thing in things[:_SHOWN_THINGS]:
        yield f"{thing['kind']} {thing.get('name') or thing['id']}"
    if len(things) > _SHOWN_THINGS:
        yield f"{len(things) - _SHOWN_THINGS} more"
