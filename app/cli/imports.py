"""`deepe import`: take over what another platform holds."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, unquote, urlsplit

import typer

from app.cli.client import Api
from app.cli.command import DEFAULT_URL, AsJson, CliFailure, ExitCode, Misused, Url
from app.cli.deepextension.importer import Importer, Options
from app.cli.deepextension.mapping import ImportMap, read_map
from app.cli.deepextension.report import Report
from app.cli.output import console, print_json, print_table, write
from app.settings import database_url
from app.store.deepextension import Found, SourceDatabase, SourceUnknown, SourceUnreadable

app = typer.Typer(no_args_is_help=True, help="Take over what another platform holds: DeepExtension.")


@app.callback()
def _group() -> None:
    """Keep `deepextension` a command of its own: other sources may follow."""


class SourceUnreachable(CliFailure):
    """The database does not answer, or refuses the login."""

    exit_code = ExitCode.UNREACHABLE


@app.command("deepextension")
def import_deepextension(
    database: Annotated[
        str,
        typer.Option(
            "--database-url",
            envvar="DEEPEXTENSION_DATABASE_URL",
            show_envvar=True,
            help="Its database: postgresql://USER:PASSWORD@HOST:PORT/NAME. It is only read.",
        ),
    ],
    map_file: Annotated[
        Path | None, typer.Option("--map", metavar="FILE", help="YAML or JSON: what is called otherwise or unknown.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; print the same report.")] = False,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose things, if there are several tenants (co_id).")
    ] = None,
    installation: Annotated[
        Path | None,
        typer.Option(
            "--installation",
            metavar="FOLDER",
            help="Its folder with deep-e-python and datasets: files that this service has not are uploaded from there.",
        ),
    ] = None,
    profiles: Annotated[
        Path, typer.Option("--profiles", metavar="FOLDER", help="Where parameter profiles are written, for --params.")
    ] = Path("deepextension-profiles"),
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Take over methods, environments, profiles, deploy targets, base models, models and data sets.

    It can be repeated: what is there already stays as it is. Ends with 1 if anything could not be taken.
    """
    mapping = read_map(map_file)
    source = _source_url(database)
    found = _read(source, mapping)
    options = Options(dry_run=dry_run, tenant=tenant, installation=installation, profiles=profiles)
    with Api(url) as api:
        report = Importer(api, found, mapping, options, lambda files, to: _write_rows(source, mapping, files, to)).run()
    if as_json:
        print_json(report.document())
    else:
        _print(report)
    if not report.complete:
        raise typer.Exit(ExitCode.FAILED)


def _source_url(given: str) -> str:
    try:
        url = database_url(given)
        if not url.startswith("postgresql") or not _place(url):
            raise ValueError
    except ValueError:
        # what was given may hold a password, also where it is no address
        raise Misused("--database-url must look like postgresql://USER:PASSWORD@HOST:PORT/NAME.") from None
    return url


def _read(url: str, mapping: ImportMap) -> Found:
    async def read() -> Found:
        source = SourceDatabase(url, mapping.naming)
        try:
            return await source.read()
        finally:
            await source.close()

    try:
        return asyncio.run(read())
    except SourceUnreadable as error:
        raise _unreachable(url, error) from None
    except SourceUnknown as error:
        raise CliFailure(
            f"This is no database of DeepExtension as its public migrations make it: {error}.",
            notes=("If its tables are called otherwise, name them with --map; docs/from-deepextension.md shows how.",),
        ) from None


def _write_rows(url: str, mapping: ImportMap, files: Sequence[str], to: Path) -> int:
    """Write the rows that the database holds of a data set as JSONL; return how many there are."""

    async def copy() -> int:
        source = SourceDatabase(url, mapping.naming)
        count = 0
        try:
            with to.open("w", encoding="utf-8") as stream:
                async for row in source.rows_of(files):
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
        finally:
            await source.close()
        return count

    try:
        return asyncio.run(copy())
    except SourceUnreadable as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: SourceUnreadable) -> SourceUnreachable:
    parts = urlsplit(url)
    reason = str(error)
    for secret in {parts.password or "", unquote(parts.password or "")} - {""}:
        reason = reason.replace(secret, "***")
    return SourceUnreachable(
        f"The database {parts.path.removeprefix('/')} at {_place(url)} cannot be read as "
        f"{parts.username or 'the present user'}: {reason}",
        notes=("Look at host, port, name, user and password; the account needs to read only.",),
    )


def _place(url: str) -> str:
    """Return where the server is: a host and a port, or the folder of its socket."""
    parts = urlsplit(url)
    if parts.hostname:
        return f"{parts.hostname}:{parts.port or 5432}"
    return next(iter(parse_qs(parts.query).get("host", ())), "")


def _print(report: Report) -> None:
    would = " (dry run: nothing was changed)" if report.dry_run else ""
    write(f"A database of {report.release}{would}\n")
    rows = [
        (
            entry.kind.replace("_", " "),
            entry.name,
            entry.outcome.value,
            "\n".join(
                [
                    *entry.problems,
                    *(f"changed: {one}" for one in entry.changed),
                    *(f"assumed: {one}" for one in entry.assumed),
                ]
            ),
        )
        for entry in report.entries
    ]
    print_table(("", "name", "outcome", "what to know"), rows, nothing="There is nothing to take.")
    numbers = [
        (name, value, one["count"], "" if one.get("meaning") is None else str(one["meaning"]))
        for name, values in report.values.items()
        for value, one in values.items()
    ]
    if numbers:
        print_table(("number", "value", "rows", "taken for"), numbers, nothing="")
    if not report.complete:
        console().print("Not everything was taken: see above. Mend it and run the same command again.", style="yellow")
