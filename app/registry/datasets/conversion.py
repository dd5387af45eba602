"""Read a data set of any format: JSONL as it is, any other file converted to JSONL once.

What scripts read is UTF-8, one object a line, without a byte order mark and blank lines. A `.jsonl` file that is so
already is left alone. Of any other, the rows are written to a hidden file beside it that is named by its content,
`.NAME.DIGEST.jsonl`: pictures are found from there as well, and a job that was submitted before an edit keeps its rows.

Everything here blocks and takes as long as the file is large; `dataset_process` calls it within limits.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

from app.domain.errors import Violation
from app.formats.base import MEDIA_TYPES, SUFFIXES, Format, FormatProblem, Limits, Options, Row, Source
from app.formats.detection import binary_format_of, container_of, head_of, text_format_of
from app.formats.reading import extract_pictures, open_rows
from app.registry.datasets.check import BOM, DatasetReport, check_lines
from app.registry.datasets.files import (
    READING_PREFIX,
    SUFFIX,
    DatasetChanging,
    FileKey,
    Inspection,
    digest_of,
    file_key,
    inspect,
    locate,
    picture_check,
    require_regular,
)

_DIGITS: Final = 16


@dataclass(frozen=True)
class Task:
    """A data set to read."""

    path: Path
    """A file, or a folder with one."""
    limits: Limits
    options: Options = field(default_factory=Options)
    keep: bool = True
    """Leave the converted file beside what it was made of; else only say what it would be."""
    extract_to: Path | None = None
    """The folder to make of an archive with pictures; None refuses one."""


def read_dataset(task: Task) -> Inspection:
    """Check a data set, and convert it if scripts could not read it as it is. Problems are in the report."""
    rows = locate(task.path).rows
    require_regular(rows)
    digest, key = "", file_key(rows)
    try:
        if _is_plain(rows, task):
            found = inspect(task.path, max_characters=task.limits.row_characters)
            if found.report.problem_count or not found.report.blank_lines:
                return found
        digest, key = digest_of(rows)
        with tempfile.TemporaryDirectory(prefix=scratch_prefix(os.getpid()), dir=rows.parent) as scratch:
            folder = task.extract_to
            if folder and extract_pictures(rows, folder, task.limits, scratch=Path(scratch)):
                return _of_archive(read_dataset(replace(task, path=folder, extract_to=None)), digest, key)
            return _converted(task, rows, digest, key, Path(scratch))
    except FormatProblem as problem:
        return Inspection(rows, digest, 0, _only(Violation(problem.pointer, problem.code, problem.params)), key)


def scratch_prefix(pid: int) -> str:
    """Return how the folder begins that a process writes to; what stops the process removes it."""
    return f"{READING_PREFIX}{pid}-"


def is_small_text(path: Path, options: Options, *, max_bytes: int) -> bool:
    """Return whether a data set can be read at once: a short text, no container and no library's format."""
    rows = locate(path).rows
    if not rows.is_file() or rows.stat().st_size > max_bytes:
        return False
    head = head_of(rows)
    try:
        return container_of(head) is None and binary_format_of(head) is None
    except FormatProblem:
        return True


def converted_files(rows: Path) -> Iterator[Path]:
    """Yield the files that were made of a file."""
    escaped = "".join(f"[{character}]" if character in "*?[" else character for character in rows.name)
    return rows.parent.glob(f".{escaped}.{'[0-9a-f]' * _DIGITS}{SUFFIX}")


def converted_name(rows: Path, digest: str) -> Path:
    """Return where the rows of a file are written."""
    return rows.with_name(f".{rows.name}.{digest[:_DIGITS]}{SUFFIX}")


def suffix_of(source: dict[str, Any] | None) -> str:
    """Return the suffix of an uploaded file that was read so."""
    if source is None:
        return SUFFIX
    own = (
        ".tsv"
        if source["delimiter"] == "\t"
        else next(one for one, kind in SUFFIXES.items() if kind == source["format"])
    )
    match source["compression"]:
        case None:
            return own
        case "gzip":
            return f"{own}.gz"
        case "tar.gzip":
            return ".tar.gz"
        case archive:
            return f".{archive}"


def _is_plain(rows: Path, task: Task) -> bool:
    """Return whether a file is JSONL in UTF-8 by its name and first bytes, and nothing is said of it."""
    head = head_of(rows)
    if rows.suffix.lower() != SUFFIX or task.options != Options() or head.startswith(BOM) or container_of(head):
        return False
    if binary_format_of(head) is not None:
        return False
    found, encoding, _ = text_format_of(rows, head, task.options, max_characters=task.limits.row_characters)
    return (found, encoding) == (Format.JSONL, "utf-8")


def _converted(task: Task, rows: Path, digest: str, key: FileKey, scratch: Path) -> Inspection:
    reading = open_rows(rows, task.options, task.limits, scratch=scratch)
    pictures = picture_check(locate(task.path)) if task.path.is_dir() else None
    written = scratch / "rows"
    with written.open("xb") as stream:
        output = _Output(stream)
        report = check_lines(
            output.copied(reading.rows), max_characters=task.limits.row_characters, picture_problem=pictures
        )
        stream.flush()
        os.fsync(stream.fileno())
    if digest_of(rows)[1] != key:
        raise DatasetChanging(path=rows.name)
    target = converted_name(rows, output.digest)
    if task.keep and not report.problem_count:
        written.replace(target)
    source = _document(reading.source, task.options, digest, key)
    return Inspection(target, output.digest, output.size, report, key, source, converted=True)


def _of_archive(found: Inspection, digest: str, key: FileKey) -> Inspection:
    """Return what was found in the folder that was made of an archive."""
    source = found.source or plain_source(found)
    archive = {"digest": digest, "size_bytes": key[2]}
    return replace(found, source={**source, "archive": archive})


def plain_source(found: Inspection) -> dict[str, Any]:
    """Return how a file was read that is what scripts read."""
    return _document(Source(Format.JSONL, encoding="utf-8"), Options(), found.digest, found.key)


def _document(source: Source, options: Options, digest: str, key: FileKey) -> dict[str, Any]:
    return {
        **asdict(source),
        "media_type": MEDIA_TYPES[source.format],
        "digest": digest,
        "size_bytes": key[2],
        "options": asdict(options),
        "archive": None,
    }


def _only(violation: Violation) -> DatasetReport:
    return DatasetReport(rows=0, columns=(), problems=(violation,), problem_count=1)


class _Output:
    """Writes rows as they pass, and knows what it wrote."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def copied(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows; those with content are written, each on a line."""
        for number, line in rows:
            yield number, line
            content = line.removeprefix(BOM).strip() if number == 1 else line.strip()
            if content:
                content += b"\n"
                self._stream.write(content)
                self._hash.update(content)
                self.size += len(content)
