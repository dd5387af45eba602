"""Check backups, and make an installation of one."""

import contextlib
import hashlib
import json
import shutil
import tarfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from gzip import BadGzipFile
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from app.access.audit import command_action
from app.access.secrets import SecretKeys, unreadable_secrets
from app.domain.audit import AuditKind
from app.domain.enums import EndReason, JobStatus
from app.executor.maintenance.backups import (
    ALWAYS,
    DIGESTS,
    FILES,
    FORMAT,
    HEAD,
    ROWS,
    BackupHead,
    BackupReport,
    BackupUnusable,
)
from app.store import audit_trail, dump, job_status, nodes, webhooks
from app.store.clock import database_now
from app.store.home import FOLDERS, PRIVATE_FOLDER, PROJECTS, Home, make_private_folder
from app.store.migrate import ReferencesBroken, SchemaState, revisions, schema_state
from app.store.session import Database

_STAGING: Final = ".restoring"
_KNOWN: Final = (*FOLDERS, PROJECTS, *ALWAYS)
_BLOCK: Final = 1024 * 1024
_MAX_HEAD_BYTES: Final = 64 * 1024 * 1024


def check(source: Path) -> BackupReport:
    """Read a backup whole and compare every digest. Blocks; raises `BackupUnusable`, `OSError`."""
    found: dict[str, str] = {}
    with _reading(source) as archive:
        head = _head(archive)
        report = BackupReport(head, size_bytes=source.stat().st_size)
        digests: Mapping[str, str] | None = None
        for info in archive:
            content = archive.extractfile(info) if info.isreg() else None
            if content is None or not _is_safe(info.name):
                raise BackupUnusable(f"The backup holds {info.name!r}, which no backup of ours does.")
            if info.name == DIGESTS:
                digests = json.loads(content.read(_MAX_HEAD_BYTES))
                if not isinstance(digests, dict):
                    raise BackupUnusable(f"The backup's {DIGESTS} is no object.")
                continue
            sha256 = hashlib.sha256()
            while block := content.read(_BLOCK):
                sha256.update(block)
            found[info.name] = sha256.hexdigest()
    if digests is None:
        raise BackupUnusable("The backup is not whole: its end is missing. Take another one.")
    for name, digest in digests.items():
        if found.get(name) != digest:
            raise BackupUnusable(f"The backup is damaged: {name} is not what was written.")
    report.files = sum(name.startswith(f"{FILES}/") for name in digests)
    report.left_out = sorted(name for name in found if name not in digests and name != DIGESTS)
    return report


async def restore(
    database: Database,
    home: Home,
    source: Path,
    *,
    keys: SecretKeys | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> BackupReport:
    """Make an installation of a backup: an empty home and an empty database become what it has.

    Jobs that had not ended are ended, because what the backup says of them is past. Webhooks are switched off, so that
    a copy sends no messages in the original's name. Raises `BackupUnusable`, `OSError`; then nothing is left.
    """
    on_step("checking the backup")
    report = check(source)
    await _require_empty(database, home)
    placed: list[Path] = []
    try:
        on_step("writing the files")
        _unpack(source, home, placed, skip=frozenset(report.left_out))
        on_step("writing the database")
        async with _restored(database, source, report.head) as (session, counts):
            now = await database_now(session)
            end = job_status.End(JobStatus.FAILED, EndReason.INSTALLATION_RESTORED, {})
            report.rows = counts
            report.webhooks_off = await webhooks.switch_all_off(session, now=now)  # before they hear of ended jobs
            report.ended_jobs = await job_status.end_all_unfinished(session, end, now=now)
            await nodes.free_names(session)
            await audit_trail.append(session, [_restored_record(report)], now=now)
    except BaseException:
        for path in placed:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    home.create()
    async with database.reading() as session:
        report.unreadable_secrets = await unreadable_secrets(session, keys or SecretKeys(home.secrets_key))
    report.missing = _missing(home, source)
    return report


def _restored_record(report: BackupReport) -> audit_trail.Entry:
    told = {"taken_at": report.head.taken_at.isoformat(), "ended_jobs": report.ended_jobs}
    return audit_trail.Entry(AuditKind.ACTION, command_action("restore"), {"things": [], "restored": told})


@contextlib.asynccontextmanager
async def _restored(database: Database, source: Path, head: BackupHead) -> AsyncIterator[tuple[Any, Mapping[str, int]]]:
    with _reading(source) as archive:
        content = archive.extractfile(ROWS)
        assert content is not None
        lines = (line.decode() for line in content)
        try:
            async with dump.restored(database, lines, revision=head.schema_revision) as found:
                yield found
        except (dump.DumpDamaged, ReferencesBroken, DBAPIError) as error:
            # the whole of a database's error holds the rows, and with them secrets
            why = error.orig if isinstance(error, DBAPIError) else error
            raise BackupUnusable(f"The backup's rows cannot be read: {why}.") from error


async def _require_empty(database: Database, home: Home) -> None:
    make_private_folder(home.root)  # SQLite makes a file, no folder
    if await schema_state(database) is not SchemaState.MISSING:
        raise BackupUnusable(
            "The database is in use already. Restore into an empty one: set DEEPE_HOME to a new folder, and "
            "DEEPE_DATABASE_URL to an empty database if yours is Postgres."
        )
    for name in _KNOWN:
        there = home.root / name
        if there.is_file() or (there.is_dir() and any(there.iterdir())):
            raise BackupUnusable(
                f"{there} is there already. Restore into an empty home: set DEEPE_HOME to a new folder."
            )


def _unpack(source: Path, home: Home, placed: list[Path], *, skip: frozenset[str]) -> None:
    staging = home.root / _STAGING
    try:
        staging.mkdir(mode=PRIVATE_FOLDER)
    except FileExistsError:
        raise BackupUnusable(
            f"{staging} is there: another restore is under way, or one was killed. If none is, remove the folder."
        ) from None
    try:
        with _reading(source) as archive:
            for info in archive:
                if not info.name.startswith(f"{FILES}/") or info.name in skip:
                    continue
                target = staging / info.name.removeprefix(f"{FILES}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(info)
                assert content is not None
                with target.open("xb") as stream:
                    shutil.copyfileobj(content, stream, _BLOCK)
                target.chmod(info.mode & 0o755 | 0o600)
        for entry in sorted(staging.iterdir()):
            target = home.root / entry.name
            if target.is_dir():
                target.rmdir()  # it is empty
            entry.rename(target)
            placed.append(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _missing(home: Home, source: Path) -> Sequence[str]:
    """Return the files that rows name and the backup did not have."""
    missing = []
    with _reading(source) as archive:
        content = archive.extractfile(ROWS)
        assert content is not None
        columns: list[str] = []
        for line in content:
            said = json.loads(line)
            if isinstance(said, dict):
                columns = said["columns"] if said["table"] in ("model", "base_model", "dataset") else []
            elif columns:
                row = dict(zip(columns, said, strict=True))
                unmade = row.get("recipe") is not None and row.get("built_at") is None
                gone = unmade or row.get("deleted_at") is not None or row["path"] is None
                if not gone and not home.absolute(row["path"]).exists():
                    missing.append(row["path"])
    return missing


def _head(archive: tarfile.TarFile) -> BackupHead:
    first = archive.next()
    content = archive.extractfile(first) if first is not None and first.name == HEAD and first.isreg() else None
    if content is None:
        raise BackupUnusable("The file is no backup of this product.")
    try:
        head = BackupHead.model_validate_json(content.read(_MAX_HEAD_BYTES))
    except ValidationError as error:
        raise BackupUnusable(f"The backup's {HEAD} cannot be read: {error.errors()[0]['msg']}.") from error
    if head.format > FORMAT or head.schema_revision not in revisions():
        raise BackupUnusable(
            f"The backup was taken by a newer version ({head.product}). Install that one or a later one."
        )
    return head


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(source) as archive:
            yield archive
    except (tarfile.TarError, BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BackupUnusable(f"The file is no backup, or is damaged: {error}.") from error


def _is_safe(name: str) -> bool:
    """Say whether a member has a name that we write: no path leads out of the home."""
    if name in (HEAD, ROWS, DIGESTS):
        return True
    parts = name.split("/")
    return len(parts) > 1 and parts[0] == FILES and parts[1] in _KNOWN and not {"", ".", ".."} & set(parts)
