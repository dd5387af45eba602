"""`deepe backup`, `deepe restore`: an installation as one file, and back. They need no running service."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.command import AsJson, CliFailure, HomeFolder, Misused
from app.cli.main import product_version
from app.cli.output import errors, print_json, size, write
from app.cli.service import load
from app.domain.plain_text import printable
from app.domain.projects import EVERY_PROJECT

if TYPE_CHECKING:
    from app.executor.maintenance.backups import BackupReport
    from app.store.home import Home
    from app.store.session import Database

SHOWN = 10
PARTS = ("models", "datasets", "images", "runs")

BackupFile = Annotated[Path, typer.Argument(metavar="FILE", help="The backup: .tar, or compressed .tar.gz.")]


def backup(
    file: BackupFile,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Take these files too: models (base models, results), datasets, images, runs (logs, checkpoints, "
            "results). Repeat it.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Take all of them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write the database, scripts and licence into one file.

    The service may run meanwhile: the database is read as it is at one moment. The file holds secrets; only its owner
    can read it.
    """
    unknown = [part for part in parts or () if part not in PARTS]
    if unknown:
        raise Misused(f"There is no part {printable(unknown[0])}; name {', '.join(PARTS)}.")
    if file.exists() and not overwrite:
        raise Misused(f"{file} is there already. Name another file, or add --overwrite.")

    from app.executor.maintenance.backups import BackupPart, take

    wanted = [BackupPart(part) for part in PARTS if everything or part in (parts or ())]

    async def work(database: "Database", place: "Home", on_step: Callable[[str], None]) -> "BackupReport":
        return await take(database, place, file, parts=wanted, product=product_version(), on_step=on_step)

    report = _run(work, home, as_json=as_json)
    if as_json:
        print_json(report.document())
        return
    write(f"{file}  {size(report.size_bytes)}: {sum(report.rows.values())} rows, {report.files} files\n")
    _list("Not taken", report.left_out)
    missing = [part for part in PARTS if part not in report.head.parts and not (part == "models" and everything)]
    if missing:
        write(f"Without the files of {', '.join(missing)}; add --with, or --all.\n")


def restore(
    file: BackupFile,
    check_only: Annotated[bool, typer.Option("--check", help="Change nothing; read the backup whole.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make an installation of a backup, in an empty home.

    DEEPE_HOME (or --home) names the new home; DEEPE_DATABASE_URL an empty database, of either kind, unless it is the
    home's own. Unfinished jobs of the backup are ended and webhooks switched off. Start no service meanwhile.
    """
    if not file.is_file():
        raise Misused(f"There is no file {file}.")

    async def work(database: "Database", place: "Home", on_step: Callable[[str], None]) -> "BackupReport":
        from app.access.secrets import SecretKeys
        from app.executor.maintenance import restoring

        if check_only:
            return restoring.check(file)
        keys = SecretKeys(place.secrets_key, load(home=home).given_secrets_key)
        return await restoring.restore(database, place, file, keys=keys, on_step=on_step)

    report = _run(work, home, as_json=as_json)
    if as_json:
        print_json(report.document())
        return
    head = report.head
    taken = f"{head.taken_at:%Y-%m-%d %H:%M} UTC by version {printable(head.product)}"
    if check_only:
        write(f"{file} is whole: taken {taken}, {report.files} files.\n")
        return
    write(f"Restored what was taken {taken}: {sum(report.rows.values())} rows, {report.files} files.\n")
    if report.ended_jobs:
        write(f"{report.ended_jobs} jobs had not ended and have failed; retry those that are still wanted.\n")
    if report.webhooks_off:
        write(f"{report.webhooks_off} webhooks are switched off; switch on those that this installation shall use.\n")
    if report.unreadable_secrets:
        key = "put its secrets.key into the home, or set DEEPE_SECRETS_KEY_FILE; else set them anew"
        write(f"Secrets were encrypted with a key that is not here; {key}.\n")
        _list("Secrets that cannot be read", list(report.unreadable_secrets))
    _list("Named by the database, and not in the backup", list(report.missing))
    _list("Not in the backup, because it could not be read", report.left_out)


def _run(
    work: "Callable[[Database, Home, Callable[[str], None]], Coroutine[Any, Any, BackupReport]]",
    home: Path | None,
    *,
    as_json: bool,
) -> "BackupReport":
    settings = load(home=home)

    from sqlalchemy.exc import DBAPIError

    from app.executor.maintenance.backups import BackupUnusable
    from app.store.home import Home
    from app.store.migrate import DatabaseUnusable
    from app.store.session import Database, DatabaseUnreachable

    async def run() -> "BackupReport":
        # files are copied between two turns of the loop, whose own handler would wait for the next one
        signal.signal(signal.SIGINT, signal.default_int_handler)
        place = Home(settings.home)
        database = Database(settings.database_url, scope=EVERY_PROJECT)
        try:
            with errors().status("starting") as status:
                return await work(database, place, lambda step: status.update(printable(step)))
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except BackupUnusable as error:
        raise CliFailure(printable(str(error))) from None
    except DatabaseUnusable as error:
        raise CliFailure(str(error), notes=[error.advice]) from None
    except DatabaseUnreachable as error:
        raise CliFailure(f"The database does not answer: {error}.") from None
    except DBAPIError as error:
        raise CliFailure(f"The database cannot be used: {error.orig}.") from None
    except OSError as error:
        raise CliFailure(f"{error.strerror}: {error.filename}" if error.filename else str(error)) from None


def _list(title: str, names: list[str]) -> None:
    if not names:
        return
    write(f"{title}: {len(names)}\n")
    for name in names[:SHOWN]:
        write(f"  {printable(name)}\n")
    if len(names) > SHOWN:
        write(f"  and {len(names) - SHOWN} more (--json lists all)\n")
