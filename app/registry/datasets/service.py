"""Data sets: registered by path or upload, checked row by row, watched for changes on disk.

A data set is what its bytes are: the digest is recorded at registration and compared at every use. A file that was
edited since is read again and gets its new digest; one that became invalid is refused with all its problems. A file of
another format than JSONL is converted once; the rows lie in a file beside it (`dataset_conversion`).
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final
from uuid import uuid4

from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import AppError, Conflict, Invalid, InvalidRequest, Violation, together_with
from app.domain.names import name_key, name_violations, normal_name
from app.domain.plain_text import storable_document
from app.formats.base import Options
from app.registry.datasets import files as dataset_files
from app.registry.datasets.check import MAX_PROBLEMS, DatasetReport, LineProblem, parse_line
from app.registry.datasets.conversion import converted_files, converted_name, plain_source, suffix_of
from app.registry.datasets.files import SUFFIX, UPLOAD_PREFIX, DatasetChanging, Inspection, inspect_part, locate
from app.registry.datasets.process import BoundedDatasetReader
from app.registry.datasets.row_surveys import profile_of
from app.registry.resource_paths import resolve_inside, stays_inside
from app.store import named
from app.store.datasets import get_dataset
from app.store.home import Home
from app.store.methods import NameTaken
from app.store.paging import PageRequest, Slice
from app.store.projects import require_room
from app.store.tables import DatasetRow
from app.store.usage import unfinished_jobs

_WRITE_BYTES: Final = 1024 * 1024
_MAX_NAME_BYTES: Final = 200
_REMEMBERED: Final = 4096
_REMEMBERED_PROFILES: Final = 64
_FOLDER: Final = ".d"
_MIX_DIGITS: Final = 16

Clock = Callable[[], datetime]


class InvalidDataset(Invalid):
    """Lines are wrong; the first hundred problems are listed."""

    code = "invalid_dataset"

    def __init__(self, name: str, report: DatasetReport) -> None:
        self._problems = report.problems
        self._count = report.problem_count
        super().__init__(dataset=name, count=report.problem_count, listed=len(report.problems))

    def violations(self) -> Sequence[Violation]:
        return self._problems

    def violation_count(self) -> int:
        return self._count


class DatasetMissing(Conflict):
    """The file of a registered data set is gone."""

    code = "dataset_missing"


class DatasetUnprofiled(Conflict):
    """The rows cannot be read as they are now."""

    code = "dataset_unprofiled"


class DatasetInUse(Conflict):
    """Unfinished jobs use the data set."""

    code = "dataset_in_use"


class DatasetIsFolder(Conflict):
    """Only what was uploaded is removed together with its entry."""

    code = "dataset_is_folder"


class DatasetFileShared(Conflict):
    """Another data set has the same file."""

    code = "dataset_file_shared"


@dataclass(frozen=True)
class Validation:
    """Everything that a create would say."""

    violations: tuple[Violation, ...]
    violation_count: int
    inspection: Inspection | None


@dataclass(frozen=True)
class Prepared:
    """A data set that was checked and can be registered."""

    name: str
    place: Path
    inspection: Inspection


@dataclass(frozen=True)
class Unplaced:
    """A new data set whose file lies in a temporary place; `placed` has the paths that it will have."""

    row: DatasetRow
    file: Path
    inspection: Inspection
    placed: Inspection


@dataclass(frozen=True)
class Preview:
    """Some rows of a data set."""

    rows: list[dict[str, Any]]
    offset: int
    total: int


class Datasets:
    """What can be done with data sets."""

    def __init__(self, *, home: Home, max_characters: int, max_bytes: int, clock: Clock) -> None:
        self._home = home
        self._max_characters = max_characters
        self._reader = BoundedDatasetReader(row_characters=max_characters, output_bytes=max_bytes)
        self._clock = clock
        self._unchanged: dict[str, tuple[dataset_files.FileKey, str]] = {}
        self._profiles: dict[dataset_files.FileKey, Mapping[str, Any]] = {}

    # ---- read -------------------------------------------------------------------------------------------------------

    async def get(self, session: AsyncSession, dataset: str) -> DatasetRow:
        """Return the data set with this id or name."""
        return await get_dataset(session, dataset)

    async def page(self, session: AsyncSession, wanted: PageRequest, *, text: str | None = None) -> Slice[DatasetRow]:
        """Return one page of the data sets."""
        return await named.page(session, DatasetRow, wanted, text=text)

    async def preview(self, row: DatasetRow, *, offset: int, limit: int) -> Preview:
        """Return rows as they stand in the file now."""
        lines = await asyncio.to_thread(self._read_rows, row, offset, limit)
        return Preview(rows=lines, offset=offset, total=row.rows)

    async def profile(self, row: DatasetRow) -> Mapping[str, Any]:
        """Return how the rows are written, how long they are and what stands twice; see `deepe_rows.profile`.

        Raises `DatasetMissing`, and `DatasetUnprofiled` for a file that is no longer what was registered.
        """
        return await asyncio.to_thread(self._profile, row)

    def _profile(self, row: DatasetRow) -> Mapping[str, Any]:
        jsonl = self._rows_file(row)
        key = dataset_files.file_key(jsonl)
        if key not in self._profiles:
            found = profile_of(jsonl)
            if "refused" in found:
                raise DatasetUnprofiled(dataset=row.name, reason=found["refused"])
            while len(self._profiles) >= _REMEMBERED_PROFILES:
                self._profiles.pop(next(iter(self._profiles)))
            self._profiles[key] = found
        return self._profiles[key]

    async def rows_file(self, row: DatasetRow) -> Path:
        """Return the file that scripts read."""
        return await asyncio.to_thread(self._rows_file, row)

    async def original_file(self, row: DatasetRow) -> Path:
        """Return the file as it was brought; of a folder, the one with the rows."""
        return await asyncio.to_thread(lambda: locate(self._path_of(row)).rows)

    async def validate(
        self, session: AsyncSession, *, name: str | None, path: str, options: Options | None = None
    ) -> Validation:
        """Return everything that a create would say; nothing changes."""
        found = [] if name is None else name_violations(name)
        inspection = None
        count = len(found)
        try:
            inspection = await self._inspect_path(path, options, keep=False)
            found += inspection.report.problems
            count += inspection.report.problem_count
        except AppError as error:
            found += error.violations()
            count += len(error.violations())
        if name is not None and await named.name_is_taken(session, DatasetRow, name):
            # first: an answer lists a hundred, and a file alone may have more
            found.insert(0, Violation("/name", "name_taken", {"name": normal_name(name)}))
            count += 1
        return Validation(violations=tuple(found[:MAX_PROBLEMS]), violation_count=count, inspection=inspection)

    # ---- create -----------------------------------------------------------------------------------------------------

    async def prepare(self, *, name: str, path: str, options: Options | None = None) -> Prepared:
        """Check the file or folder `path` of `datasets/`; it may take minutes, so no statement is run."""
        with together_with(name_violations(name)):
            inspection = await self._inspect_path(path, options, keep=True)
            _require_valid(name, inspection)
        return Prepared(name=normal_name(name), place=self._home.datasets / Path(path), inspection=inspection)

    async def create(self, session: AsyncSession, prepared: Prepared, *, description: str = "") -> DatasetRow:
        """Register what was prepared."""
        row = self._new_row(prepared, description)
        await require_room(session, new_bytes=row.size_bytes)
        await named.insert(session, row)
        return row

    def _new_row(self, prepared: Prepared, description: str) -> DatasetRow:
        return DatasetRow(
            id=str(uuid4()),
            name=prepared.name,
            name_key=name_key(prepared.name),
            description=description,
            path=self._home.relative(prepared.place),
            **_found(self._home, prepared.inspection),
            created_at=self._clock(),
        )

    async def check_new_name(self, session: AsyncSession, name: str) -> None:
        """Raise what is wrong with the name of a data set to be."""
        _check_new_name(name)
        if await named.name_is_taken(session, DatasetRow, name):
            raise NameTaken(name=normal_name(name), pointer="{dataset}")

    async def upload(
        self, session: AsyncSession, *, name: str, chunks: AsyncIterable[bytes], options: Options | None = None
    ) -> DatasetRow:
        """Receive a file, check it, give it its place under `datasets/` and register it; or leave nothing behind."""
        _check_new_name(name)

        async def fill(file: Path) -> None:
            await _write(file, chunks)

        async with self.unplaced(name, fill, options) as new:
            return await self.place(session, new)

    @asynccontextmanager
    async def unplaced(
        self,
        name: str,
        fill: Callable[[Path], Awaitable[dict[str, Any] | None]],
        options: Options | None = None,
        *,
        description: str = "",
    ) -> AsyncIterator[Unplaced]:
        """Yield a new data set whose file or folder `fill` makes; it is gone afterwards unless it was placed.

        What `fill` returns is how it was mixed out of others.
        """
        file = self._home.datasets / f"{UPLOAD_PREFIX}{uuid4().hex}{SUFFIX}"
        try:
            mix, stem = await fill(file), name
            inspection = await asyncio.to_thread(self._reader.read, file, options, extract_to=file.with_suffix(_FOLDER))
            _require_valid(name, inspection)
            if mix is not None:
                inspection = replace(inspection, source={**plain_source(inspection), "mix": mix})
                stem = f"{name}.{mix['digest'][:_MIX_DIGITS]}"  # the file of an earlier mix may be there still
                if made_as_folder(inspection.source):
                    stem = f"{stem}.{uuid4().hex[:_MIX_DIGITS]}"  # its folder may be in use
            place = self._home.datasets / _file_name(stem, inspection.source)
            placed = _placed(file, place, inspection)
            row = self._new_row(Prepared(name=normal_name(name), place=place, inspection=placed), description)
            yield Unplaced(row, file, inspection, placed)
        finally:
            await asyncio.to_thread(_remove_upload, file)

    async def place(self, session: AsyncSession, new: Unplaced) -> DatasetRow:
        """Register a new data set and give its file its place under `datasets/`."""
        await require_room(session, new_bytes=new.row.size_bytes)
        # the row first: it decides who of two may have the name
        await named.insert(session, new.row)
        await asyncio.to_thread(_place, new.file, self._home.absolute(new.row.path), new.inspection, new.placed)
        return new.row

    async def remove_abandoned_uploads(self) -> int:
        """Remove what crashed uploads left behind; return how many. Called at start."""
        return await asyncio.to_thread(dataset_files.remove_abandoned_uploads, self._home.datasets)

    # ---- use --------------------------------------------------------------------------------------------------------

    def current(self, row: DatasetRow) -> Inspection | None:
        """Return None if the file still has the recorded bytes, else what it is now; blocks.

        Raises `DatasetMissing` and `InvalidDataset`. A file that was not touched is not read again.
        """
        inspection = self._changed(self._path_of(row), row)
        if inspection is not None:
            _require_valid(row.name, inspection)
        return inspection

    def part(self, folder: Path, part: Path) -> Inspection:
        """Return what another part of the rows in a data set's folder is now; blocks."""
        return inspect_part(folder, part, max_characters=self._max_characters)

    def jsonl_of(self, row: DatasetRow) -> Path:
        """Return the file that scripts read, as it was recorded; scripts find pictures beside it."""
        converted = row.source["jsonl"] if row.source is not None else None
        return self._home.absolute(converted) if converted else locate(self._home.absolute(row.path)).rows

    async def record(self, session: AsyncSession, row: DatasetRow, inspection: Inspection) -> None:
        """Make what was found on disk the data set's new content."""
        await named.update(
            session,
            row,
            **_found(self._home, inspection),
        )

    async def refresh(self, session: AsyncSession, row: DatasetRow) -> bool:
        """Bring the row up to date with the disk; return whether it changed. Call it early in a transaction."""
        inspection = await asyncio.to_thread(self.current, row)
        if inspection is None:
            return False
        await self.record(session, row, inspection)
        return True

    # ---- delete -----------------------------------------------------------------------------------------------------

    async def delete(self, session: AsyncSession, dataset: str, *, with_file: bool) -> Callable[[], Awaitable[None]]:
        """Delete the entry; return what removes the file, to be called once the transaction is committed."""
        row = await get_dataset(session, dataset)
        if jobs := await unfinished_jobs(session, dataset_id=row.id):
            raise DatasetInUse(dataset=row.name, count=len(jobs), jobs=", ".join(jobs[:5]))
        path = self._home.absolute(row.path)
        if with_file and path.is_dir() and not made_as_folder(row.source):
            raise DatasetIsFolder(dataset=row.name, path=row.path)
        shared = await self._shared(session, row)
        if with_file and shared:
            raise DatasetFileShared(dataset=row.name, path=row.path)
        await named.delete(session, row)
        self._unchanged.pop(row.path, None)

        async def remove() -> None:
            if stays_inside(self._home.datasets, path) and not shared:
                await asyncio.to_thread(_remove, path, with_original=with_file)

        return remove

    async def _shared(self, session: AsyncSession, row: DatasetRow) -> bool:
        others = select(DatasetRow.id).where(DatasetRow.path == row.path, col(DatasetRow.id) != row.id)
        return (await session.exec(others)).first() is not None

    # ---- helpers ----------------------------------------------------------------------------------------------------

    async def _inspect_path(self, given: str, options: Options | None, *, keep: bool) -> Inspection:
        return await asyncio.to_thread(self._inspect, given, options, keep=keep)

    def _inspect(self, given: str, options: Options | None, *, keep: bool) -> Inspection:
        return self._reader.read(resolve_inside(self._home.datasets, given), options, keep=keep)

    def _path_of(self, row: DatasetRow) -> Path:
        path = self._home.absolute(row.path)
        if not stays_inside(self._home.datasets, path) or not path.exists():
            raise DatasetMissing(dataset=row.name, path=row.path)
        return path

    def _rows_file(self, row: DatasetRow) -> Path:
        path = self._path_of(row)
        if row.source is None or row.source["jsonl"] is None:
            return locate(path).rows
        inspection = self._changed(path, row)
        if inspection is None:
            return self._home.absolute(row.source["jsonl"])
        _require_valid(row.name, inspection)
        return inspection.jsonl

    def _changed(self, path: Path, row: DatasetRow) -> Inspection | None:
        """Return what the file is now if it was edited, or if the rows that were made of it are not there."""
        brought = locate(path).rows
        converted = row.source["jsonl"] if row.source is not None else None
        recorded = row.source["digest"] if row.source is not None and converted else row.digest
        whole = converted is None or self._home.absolute(converted).exists()
        if whole and self._unchanged.get(row.path) == (dataset_files.file_key(brought), recorded):
            return None
        digest, key = dataset_files.digest_of(brought)
        inspection = None
        if digest != recorded or not whole:
            options = Options(**row.source["options"]) if row.source is not None else None
            inspection = self._reader.read(path, options)
            if inspection.report.problem_count:
                return inspection
            source = inspection.source
            key, recorded = inspection.key, inspection.digest if source is None else source["digest"]
        if dataset_files.is_settled(key):
            if len(self._unchanged) >= _REMEMBERED:
                self._unchanged.clear()
            self._unchanged[row.path] = (key, recorded)
        return inspection

    def _read_rows(self, row: DatasetRow, offset: int, limit: int) -> list[dict[str, Any]]:
        limits = {"max_characters": self._max_characters}
        lines = dataset_files.read_rows(self._rows_file(row), offset=offset, limit=limit, **limits)
        try:
            rows = [parse_line(line, first=number == 1, **limits) for number, line in lines]
            return [row for row in rows if row is not None]
        except LineProblem:
            # edited since it was registered: say everything that is wrong with it now
            _require_valid(row.name, self._reader.read(self._path_of(row), keep=False))
            raise DatasetChanging(path=row.path) from None


def _found(home: Home, inspection: Inspection) -> dict[str, Any]:
    """Return what a row records of an inspection."""
    source = inspection.source
    if source is not None:
        converted = home.relative(inspection.jsonl) if inspection.converted else None
        source = storable_document({**source, "jsonl": converted})
    return {
        "digest": inspection.digest,
        "rows": inspection.report.rows,
        "size_bytes": inspection.size_bytes,
        "columns": inspection.report.column_names,
        "report": inspection.report.document(),
        "source": source,
    }


def _check_new_name(name: str) -> None:
    if found := name_violations(name, "{dataset}"):
        raise InvalidRequest(found)


def _require_valid(name: str, inspection: Inspection) -> None:
    if inspection.report.problem_count:
        raise InvalidDataset(normal_name(name), inspection.report)


def made_as_folder(source: Mapping[str, Any] | None) -> bool:
    """Return whether we made a folder for the data set: of an archive, or of a mix with files."""
    return source is not None and bool(source["archive"] or (source.get("mix") or {}).get("pictures") is not None)


def _file_name(name: str, source: dict[str, Any] | None) -> str:
    """Return the name of an uploaded file: the data set's, unless file systems would not take it or hide it."""
    normal = normal_name(name)
    suffix = "" if made_as_folder(source) else suffix_of(source)
    if len(normal.encode()) > _MAX_NAME_BYTES or normal.startswith((".", "-")):
        return f"{uuid4().hex}{suffix}"
    return normal + suffix


def _placed(upload: Path, place: Path, inspection: Inspection) -> Inspection:
    """Return what was found, with the paths that it will have."""
    if made_as_folder(inspection.source):
        return replace(inspection, jsonl=place / inspection.jsonl.relative_to(_folder_of(upload)))
    jsonl = converted_name(place, inspection.digest) if inspection.converted else place
    return replace(inspection, jsonl=jsonl)


def _place(upload: Path, place: Path, inspection: Inspection, placed: Inspection) -> None:
    source = inspection.source
    if made_as_folder(source):
        dataset_files.place_folder(_folder_of(upload), place)
        return
    dataset_files.place(upload, place, digest=inspection.digest if source is None else source["digest"])
    if inspection.converted:
        inspection.jsonl.replace(placed.jsonl)


def _folder_of(upload: Path) -> Path:
    """Return the folder that came: of a mix the upload itself, else what was unpacked of it."""
    return upload if upload.is_dir() else upload.with_suffix(_FOLDER)


def _remove_upload(upload: Path) -> None:
    for path in (upload, upload.with_suffix(_FOLDER), *converted_files(upload)):
        dataset_files.remove(path)


def _remove(path: Path, *, with_original: bool) -> None:
    rows = path
    with contextlib.suppress(AppError, OSError):
        rows = locate(path).rows
    for made in converted_files(rows):
        dataset_files.remove(made)
    if with_original:
        dataset_files.remove(path)


async def _write(path: Path, chunks: AsyncIterable[bytes]) -> None:
    """Write all chunks; gathered, so that no thread is needed for every few kilobytes."""
    with path.open("xb") as stream:
        gathered = bytearray()
        async for chunk in chunks:
            gathered += chunk
            if len(gathered) >= _WRITE_BYTES:
                await asyncio.to_thread(stream.write, bytes(gathered))
                gathered.clear()
        await asyncio.to_thread(stream.write, bytes(gathered))
        await asyncio.to_thread(_sync, stream)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
