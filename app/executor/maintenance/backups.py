"""Backups: one tar file with what an installation cannot make again, taken while the service runs.

`backup.json` stands first (format, versions, what is in it), then `database.jsonl` (`app.store.dump`), then the files
of the home under `home/`, then `digests.json`: sha256 of each, and the proof that the archive is whole. Rows are read
in one snapshot, files after it: what rows name is immutable (versions of scripts, results) or is checked by its digest
where it is used (data sets).
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from pydantic import ConfigDict

from app.domain.values import Value
from app.executor.runs.run_folder import RunFolder
from app.store import dump
from app.store.home import FOLDERS_OF_PROJECT, PRIVATE_FILE, Home
from app.store.migrate import SchemaState, revision_of, schema_state
from app.store.session import Database

FORMAT: Final = 1
COMPRESSED: Final = (".tar.gz", ".tgz")
HEAD, ROWS, DIGESTS, FILES = "backup.json", "database.jsonl", "digests.json", "home"
ALWAYS: Final = ("versions", "license.json", "environments")


class BackupPart(StrEnum):
    """What a backup has besides the database, the scripts with their versions, the licence and locks."""

    MODELS = "models"
    DATASETS = "datasets"
    IMAGES = "images"
    RUNS = "runs"


_FOLDERS_OF: Final[Mapping[BackupPart, tuple[str, ...]]] = {
    BackupPart.MODELS: ("models",),
    BackupPart.DATASETS: ("datasets",),
    BackupPart.IMAGES: ("images", "multimodal", "knowledgeBase"),
    BackupPart.RUNS: ("runs", "logs"),
}


class BackupUnusable(ValueError):
    """The file is no backup, is damaged, or cannot be restored here; the text says why and what to do."""


class BackupHead(Value):
    """What a backup says of itself."""

    model_config = ConfigDict(frozen=True)

    format: int
    product: str
    schema_revision: str
    database: str
    taken_at: datetime
    parts: tuple[BackupPart, ...]


@dataclass
class BackupReport:
    """What was written or restored. `left_out`: files that could not be taken, each with the reason."""

    head: BackupHead
    rows: Mapping[str, int] = field(default_factory=dict)
    files: int = 0
    size_bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    ended_jobs: int = 0
    webhooks_off: int = 0
    missing: Sequence[str] = ()
    unreadable_secrets: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "backup": self.head.model_dump(mode="json"),
            "rows": dict(self.rows),
            "files": self.files,
            "size_bytes": self.size_bytes,
            "left_out": self.left_out,
            "ended_jobs": self.ended_jobs,
            "webhooks_off": self.webhooks_off,
            "missing": list(self.missing),
            "unreadable_secrets": list(self.unreadable_secrets),
        }


async def take(
    database: Database,
    home: Home,
    target: Path,
    *,
    parts: Sequence[BackupPart],
    product: str,
    on_step: Callable[[str], None] = lambda _: None,
) -> BackupReport:
    """Write a backup to `target`, which appears when it is whole; `on_step` is called with the name of each step.

    Raises `BackupUnusable` for a database without the newest schema, and `OSError`.
    """
    if await schema_state(database) is not SchemaState.CURRENT:
        raise BackupUnusable("The database has not the schema of this version; run deepe migrate first.")
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    rows = draft.with_name(f"{draft.name}.rows")
    try:
        on_step("reading the database")
        revision, counts, folders = await _spool(database, rows)
        head = BackupHead(
            format=FORMAT,
            product=product,
            schema_revision=revision,
            database=database.engine.dialect.name,
            taken_at=datetime.now(UTC),
            parts=tuple(parts),
        )
        report = BackupReport(head, rows=counts)
        named = _named(home, parts)
        named += folders if BackupPart.MODELS in parts and BackupPart.RUNS not in parts else []
        unfinished = {draft.resolve(), rows.resolve(), target.resolve()}  # they may lie in a folder that is taken
        files = ((name, path) for name, path in _files(home, named, report) if path.resolve() not in unfinished)
        _write(draft, rows, files, report, on_step, compressed=target.name.endswith(COMPRESSED))
        report.size_bytes = draft.stat().st_size
        draft.replace(target)
    finally:
        for path in (draft, rows):
            path.unlink(missing_ok=True)
    return report


def _named(home: Home, parts: Sequence[BackupPart]) -> list[str]:
    """Return what a backup takes of the home, and of the folders of the other projects."""
    wanted = ["scripts", *(name for part in parts for name in _FOLDERS_OF[part])]
    of_projects = [
        home.relative(project.base / name)
        for project in home.of_every_project()
        if project != home
        for name in wanted
        if name in FOLDERS_OF_PROJECT
    ]
    return [*ALWAYS, *wanted, *of_projects]


async def _spool(database: Database, target: Path) -> tuple[str, Mapping[str, int], Sequence[str]]:
    """Write all rows to a file; return the schema, rows of each table, and the folders of models."""
    counts: dict[str, int] = {}
    folders: list[str] = []
    with _private(target) as stream:
        async with dump.snapshot(database) as connection:
            revision = await connection.run_sync(revision_of)
            assert revision is not None
            table, path_at = "", -1
            async for line in dump.dump(connection):
                stream.write(line.encode())
                if line.startswith("{"):
                    said = json.loads(line)
                    table, counts[said["table"]] = said["table"], 0
                    path_at = said["columns"].index("path") if table in ("model", "base_model") else -1
                    continue
                counts[table] += 1
                if path_at >= 0 and (path := json.loads(line)[path_at]) is not None:
                    folders.append(path)
        stream.flush()
        os.fsync(stream.fileno())
    return revision, counts, folders


def _write(
    draft: Path,
    rows: Path,
    files: Iterator[tuple[str, Path]],
    report: BackupReport,
    on_step: Callable[[str], None],
    *,
    compressed: bool,
) -> None:
    digests: dict[str, str] = {}
    with _private(draft) as stream:
        with _archive(stream, compressed=compressed) as archive:
            _add_text(archive, HEAD, report.head.model_dump_json(indent=2), digests)
            _add(archive, ROWS, rows, digests, report)
            for name, path in files:
                on_step(name)
                _add(archive, f"{FILES}/{name}", path, digests, report)
                report.files += 1
            _add_text(archive, DIGESTS, json.dumps(digests, indent=0), {})
        stream.flush()
        os.fsync(stream.fileno())


def _archive(stream: IO[bytes], *, compressed: bool) -> tarfile.TarFile:
    if compressed:
        return tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=1)
    return tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT)


def _files(home: Home, named: Sequence[str], report: BackupReport) -> Iterator[tuple[str, Path]]:
    """Yield the files below these names of the home, each once; what is no file is noted."""
    seen: set[str] = set()
    for name in named:
        top = home.root / name
        if top.is_file():
            entries: Iterator[tuple[str, Path]] = iter([(name, top)])
        else:
            entries = _walk(top, name, report)
        for relative, path in entries:
            if relative not in seen:
                seen.add(relative)
                yield relative, path


def _walk(folder: Path, name: str, report: BackupReport) -> Iterator[tuple[str, Path]]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        inside = PurePosixPath(name, *Path(root).relative_to(folder).parts)
        if inside.parts[0] == "environments" and "packs" in folders:
            folders.remove("packs")  # made again by packing
        for linked in [one for one in folders if Path(root, one).is_symlink()]:
            report.left_out.append(f"{inside / linked}: a link to a folder")
        if RunFolder.REDACTIONS in files:  # an attempt runs that was given secrets: they stand in the files
            report.left_out.append(f"{inside}: files of an attempt that runs with secrets")
            files = []
        for file in sorted(files):
            path = Path(root, file)
            if path.is_file():
                yield str(inside / file), path
            else:
                report.left_out.append(f"{inside / file}: no file")


def _add(archive: tarfile.TarFile, name: str, path: Path, digests: dict[str, str], report: BackupReport) -> None:
    try:
        with path.open("rb") as stream:
            info = archive.gettarinfo(arcname=name, fileobj=stream)
            # a file with several names would become a link; what it links to may be left out
            info.type, info.linkname, info.mode = tarfile.REGTYPE, "", info.mode & 0o777
            info.size = os.fstat(stream.fileno()).st_size
            info.uname = info.gname = ""
            info.uid = info.gid = 0
            measured = _Measured(stream, info.size)
            archive.addfile(info, measured)
    except (FileNotFoundError, PermissionError) as error:
        report.left_out.append(f"{name.removeprefix(f'{FILES}/')}: {error.strerror}")
        return
    if measured.short:
        report.left_out.append(f"{name.removeprefix(f'{FILES}/')}: became shorter while it was read")
    else:
        digests[name] = measured.digest


def _add_text(archive: tarfile.TarFile, name: str, text: str, digests: dict[str, str]) -> None:
    content = text.encode()
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), PRIVATE_FILE, int(datetime.now(UTC).timestamp())
    archive.addfile(info, io.BytesIO(content))
    digests[name] = hashlib.sha256(content).hexdigest()


class _Measured(io.RawIOBase):
    """Reads as many bytes as were promised, and their digest; a file that has become shorter is filled with zeros."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left, self._sha256 = stream, size, hashlib.sha256()
        self.short = False

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        content = self._stream.read(wanted)
        if len(content) < wanted:
            self.short = True
            content += bytes(wanted - len(content))
        self._left -= len(content)
        self._sha256.update(content)
        return content

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()


@contextlib.contextmanager
def _private(path: Path) -> Iterator[IO[bytes]]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
    with os.fdopen(descriptor, "wb") as stream:
        yield stream
