"""What a file is, by its first bytes: a format with rows, a container of one, or something else that has a name."""

import json
import re
from pathlib import Path
from typing import Final

from app.formats.base import Format, FormatProblem, Options
from app.formats.delimited import SEPARATOR_LINE, find_delimiter
from app.formats.json_documents import WRAPPERS
from app.formats.text import HEAD_BYTES, encoding_of, head_text

GZIP, ZIP, TAR = "gzip", "zip", "tar"
_TAR_MAGIC_AT: Final = 257
_CONTAINERS: Final = ((b"\x1f\x8b", GZIP), (b"PK\x03\x04", ZIP), (b"PK\x05\x06", ZIP))
_BINARY: Final = ((b"PAR1", Format.PARQUET), (b"ARROW1", Format.ARROW))
# what people pick by mistake, under names that are the same in every language
_FOREIGN: Final = (
    (b"%PDF", "PDF"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"\xd0\xcf\x11\xe0", "Excel 97-2003 (.xls) / Word 97-2003 (.doc)"),
    (b"SQLite format 3\0", "SQLite"),
    (b"BZh", "bzip2 (.bz2)"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard (.zst)"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip (.7z)"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"FEA1", "Feather 1"),
    (b"\xff\xff\xff\xff", "Arrow stream"),
    (b"Obj\x01", "Avro"),
    (b"ORC", "ORC"),
    (b"\x93NUMPY", "NumPy (.npy)"),
    (b"\x89HDF", "HDF5"),
    (b"\x80\x04\x95", "Python pickle"),
    (b"\x80\x05\x95", "Python pickle"),
    (b"\x7fELF", "ELF"),
    (b"MZ\x90", "Windows (.exe)"),
    (b"ID3", "MP3"),
    (b"OggS", "Ogg"),
    (b"RIFF", "WebP / WAV / AVI"),
    (b"{\\rtf", "RTF"),
    (b"<?xml", "XML"),
    (b"<!doctype html", "HTML"),
    (b"<html", "HTML"),
)
_LOOKED_AT: Final = 5
_JSON: Final = re.compile(r"""\s*(?:\{\s*["}\n]|\[\s*[\[{\]"\n])""")
"""How no table begins, whatever is said of it."""
_WRAPPED: Final = re.compile(r"""\s*\{\s*"([^"\\]{1,40})"\s*:\s*\[\s*\{""")


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES)


def container_of(head: bytes) -> str | None:
    """Return the container that the bytes begin, if they do."""
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return TAR
    return next((name for magic, name in _CONTAINERS if head.startswith(magic)), None)


def binary_format_of(head: bytes) -> Format | None:
    """Return the binary format with rows that the bytes begin; a problem names any other binary file."""
    found = next((name for magic, name in _BINARY if head.startswith(magic)), None)
    if found is not None:
        return found
    start = head[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, name in _FOREIGN:
        if head.startswith(magic) or (magic.startswith(b"<") and start.startswith(magic)):
            raise FormatProblem("file_is_other", format=name)
    return None


def text_format_of(path: Path, head: bytes, options: Options, *, max_characters: int) -> tuple[Format, str, str | None]:
    """Return format, encoding and delimiter of a text; a problem if it is none with rows."""
    whole = len(head) < HEAD_BYTES
    encoding = encoding_of(head, options.encoding)
    text = head_text(head, encoding or "latin-1")
    if not text.strip():
        return Format.JSONL, encoding or "utf-8", None
    said = options.table or options.delimiter is not None
    if text.lstrip()[0] == "[" and (not said or _JSON.match(text)):
        found = Format.JSON
    elif _has_objects(text) and (not said or _JSON.match(text)):
        found = Format.JSON if _is_document(path, text, encoding or "utf-8", max_characters) else Format.JSONL
    else:
        return _table(head, text, encoding, options, whole=whole)
    if encoding is None and found is Format.JSON:
        raise FormatProblem("text_encoding_unclear", byte=_first_odd(head))
    return found, encoding or "utf-8", None  # each line says for itself that it is not UTF-8


def _table(
    head: bytes, text: str, encoding: str | None, options: Options, *, whole: bool
) -> tuple[Format, str, str | None]:
    controls = sum(character < " " and character not in "\t\r\n\f" for character in text[:4096])
    if controls * 50 > len(text[:4096]):
        raise FormatProblem("file_unknown")
    table = options.table or options.delimiter is not None
    marked = SEPARATOR_LINE.match(text)
    delimiter = options.delimiter or (marked and marked[1]) or find_delimiter(text, whole=whole, table=table)
    if encoding is None:
        raise FormatProblem("text_encoding_unclear", byte=_first_odd(head))
    if delimiter is None:
        raise FormatProblem("text_without_rows")
    return Format.CSV, encoding, delimiter


def _has_objects(text: str) -> bool:
    """Return whether a text begins with an object, or has one on a line behind comments or broken lines."""
    if text.lstrip().startswith("{"):
        return True
    lines = [line.strip() for line in text.split("\n", 10 * _LOOKED_AT) if line.strip()]
    return any(line.startswith("{") and _is_object(line) for line in lines[:_LOOKED_AT])


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_document(path: Path, text: str, encoding: str, max_characters: int) -> bool:
    """Return whether a text that begins with an object is one JSON document instead of an object a line."""
    if not text.lstrip().startswith("{"):
        return False  # a comment, a broken line
    with path.open("r", encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="replace") as stream:
        first = ""
        while not first.strip() and (line := stream.readline(max_characters + 2)):
            first = line
        more = ""
        while not more.strip() and (line := stream.readline(HEAD_BYTES)):
            more = line
    if len(first) > max_characters and not first.endswith("\n"):
        wrapped = _WRAPPED.match(first)
        return wrapped is not None and wrapped[1].lower() in WRAPPERS
    try:
        row = json.loads(first)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return False  # a whole object, and something behind it
        # it goes on in the next line, unless that begins an object of its own
        goes_on = first.rstrip()[-1] in "[{,:" or not more.lstrip().startswith("{")
        return error.pos >= len(first.rstrip()) - 1 and bool(more.strip()) and goes_on
    except (ValueError, RecursionError):
        return False
    if more.strip() or not isinstance(row, dict):
        return False
    arrays = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return any(name.lower() in WRAPPERS for name in arrays)


def _first_odd(head: bytes) -> int:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start + 1
    return 1
