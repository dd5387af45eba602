"""Open a file of any format and return its rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from app.formats import archives, json_documents
from app.formats.base import TEXTS, Format, FormatProblem, Limits, Options, Reading, Row, Source
from app.formats.delimited import named_delimiter, table_rows
from app.formats.detection import GZIP, TAR, ZIP, binary_format_of, container_of, head_of, text_format_of
from app.formats.text import cut_lines, text_of, undecodable


def open_rows(path: Path, options: Options, limits: Limits, *, scratch: Path) -> Reading:
    """Return the rows of a file; `scratch` is an empty folder for what has to be unpacked."""
    if options.delimiter is not None:
        options = replace(options, delimiter=named_delimiter(options.delimiter))
    plain, compression, member, left_out = _unpacked(path, limits, scratch)
    head = head_of(plain)
    container = container_of(head)
    if container == ZIP and archives.is_workbook(plain):
        found, encoding, delimiter = Format.XLSX, None, None
    elif container is not None:
        raise FormatProblem("archive_nested")
    else:
        binary = binary_format_of(head)
        if binary is not None:
            found, encoding, delimiter = binary, None, None
        else:
            found, encoding, delimiter = text_format_of(plain, head, options, max_characters=limits.row_characters)
    _require_used(options, found)
    source = Source(found, compression, member, encoding, delimiter, left_out=list(left_out))
    return Reading(source, _rows(plain, source, options, limits))


def extract_pictures(path: Path, folder: Path, limits: Limits, *, scratch: Path) -> bool:
    """Make `folder` of an archive that is a data folder with pictures; return False for any other file."""
    container = container_of(head_of(path))
    if container == GZIP:
        path = archives.unpacked(path, scratch / "archive", limits)
        container = container_of(head_of(path))
    if container in (None, GZIP) or (container != TAR and archives.is_workbook(path)):
        return False
    with archives.opened_archive(path, limits) as archive:
        contents = archive.contents()
        if contents.pictures:
            archive.extract(contents, folder)
        return contents.pictures


def _unpacked(path: Path, limits: Limits, scratch: Path) -> tuple[Path, str | None, str | None, list[str]]:
    """Return the file that holds the rows, how it was packed, under which name, and what lay beside it."""
    compression = member = None
    container = container_of(head_of(path))
    if container == GZIP:
        path = archives.unpacked(path, scratch / "unpacked", limits)
        compression, container = GZIP, container_of(head_of(path))
    if container is None or container == GZIP or (container != TAR and archives.is_workbook(path)):
        return path, compression, None, []
    with archives.opened_archive(path, limits) as archive:
        contents = archive.contents()
        if contents.pictures:
            raise FormatProblem("archive_has_pictures")
        target = scratch / "member"
        archive.write(contents.rows, target)
        member = contents.rows.name
        left_out = [other.name[:200] for other in contents.others[:100]]
    return target, f"{container}.{compression}" if compression else container, member, left_out


def _rows(path: Path, source: Source, options: Options, limits: Limits) -> Iterator[Row]:
    if source.format in TEXTS:
        try:
            yield from _text_rows(path, source, limits)
        except UnicodeDecodeError:
            assert source.encoding is not None
            raise undecodable(path, source.encoding) from None
    elif source.format is Format.XLSX:
        from app.formats.workbooks import workbook_rows

        yield from workbook_rows(path, source, options.sheet, limits)
    else:
        from app.formats.columnar import columnar_rows

        yield from columnar_rows(path, source, limits)


def _text_rows(path: Path, source: Source, limits: Limits) -> Iterator[Row]:
    encoding = source.encoding or "utf-8"
    longest = limits.row_characters
    if source.format is Format.JSONL and encoding == "utf-8":
        with path.open("rb") as stream:
            yield from enumerate(cut_lines(stream.readline, 4 * longest + 2), start=1)
        return
    with text_of(path, encoding, newline="\n" if source.format is Format.JSONL else "") as text:
        match source.format:
            case Format.JSONL:
                for number, line in enumerate(cut_lines(text.readline, longest), start=1):
                    yield number, line.encode()
            case Format.JSON:
                yield from json_documents.document_rows(text, source, max_characters=longest)
            case _:
                assert source.delimiter is not None
                yield from table_rows(text, source.delimiter, max_characters=longest)


def _require_used(options: Options, found: Format) -> None:
    """Refuse an option that would have no effect on this format."""
    for name, value, formats in (
        ("encoding", options.encoding, TEXTS),
        ("delimiter", options.delimiter, {Format.CSV}),
        ("sheet", options.sheet, {Format.XLSX}),
    ):
        if value is not None and found not in formats:
            raise FormatProblem("option_not_used", pointer=f"/{name}", option=name, format=found.value)
