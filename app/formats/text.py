"""Encodings: which one a text has, and its lines without more memory than the longest may take."""

import codecs
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import AnyStr, Final

from app.formats.base import FormatProblem

HEAD_BYTES: Final = 256 * 1024
UTF8: Final = "utf-8"
# the named ones; GBK and GB2312 are parts of GB18030
_ALIASES: Final = {"gbk": "gb18030", "gb2312": "gb18030", "ascii": UTF8}
_KNOWN: Final = (
    *("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "big5", "big5hkscs", "cp950"),
    *("shift_jis", "cp932", "euc_jp", "euc_kr", "cp949", "koi8-r", "mac-roman"),
    *(f"cp125{n}" for n in range(9)),
    *(f"iso8859-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)),
)
SHOWN_ENCODINGS: Final = "utf-8, utf-16, gb18030, big5, shift_jis, euc_kr, cp1252"
_NAMES: Final = {codecs.lookup(name).name: name for name in _KNOWN}
# the longer marks first: that of UTF-32 begins with that of UTF-16
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHINESE_PAIR: Final = re.compile(rb"[\xa1\xa3\xb0-\xf7][\xa1-\xfe]")
_MIN_PAIRS: Final = 30


def named_encoding(name: str) -> str:
    """Return Python's name of an encoding that a caller named."""
    try:
        found = codecs.lookup(name.strip()).name
    except (LookupError, ValueError):
        found = ""
    found = _ALIASES.get(found, found)
    if codecs.lookup(found).name not in _NAMES if found else True:
        raise FormatProblem("encoding_unknown", pointer="/encoding", encoding=name[:40], known=SHOWN_ENCODINGS)
    return _NAMES[codecs.lookup(found).name]


def encoding_of(head: bytes, named: str | None) -> str | None:
    """Return the encoding of a text by its first bytes; None if it has to be named.

    The mark at the beginning decides. Without one UTF-8 is taken if it fits, UTF-16 if every other byte is zero, and
    GB18030 if what is not ASCII can hardly be anything else. A named encoding must not contradict the mark.
    """
    wanted = None if named is None else named_encoding(named)
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if marked is not None:
        if wanted is not None and not wanted.startswith(marked):
            raise FormatProblem("encoding_contradicts", pointer="/encoding", encoding=wanted, marked=marked)
        return marked
    if wanted is not None:
        return wanted
    for encoding, zeros in (("utf-16-le", head[1:2000:2]), ("utf-16-be", head[0:2000:2])):
        other = head[0:2000:2] if encoding == "utf-16-le" else head[1:2000:2]
        if len(zeros) > 1 and zeros.count(0) > len(zeros) // 2 and other.count(0) < len(other) // 8:
            return encoding
    if decodes(head, UTF8):
        return UTF8
    return "gb18030" if _is_chinese(head) else None


def decodes(head: bytes, encoding: str) -> bool:
    """Return whether the bytes are text of this encoding; the last character may be cut off."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def head_text(head: bytes, encoding: str) -> str:
    """Return the text of the first bytes, as far as it can be decoded."""
    return codecs.getincrementaldecoder(encoding)("replace").decode(head).removeprefix("\ufeff")


def text_of(path: Path, encoding: str, *, newline: str | None) -> io.TextIOWrapper:
    """Open a text; a mark at its beginning is left out."""
    return path.open("r", encoding="utf-8-sig" if encoding == UTF8 else encoding, newline=newline)


def cut_lines(readline: Callable[[int], AnyStr], limit: int) -> Iterator[AnyStr]:
    """Yield lines with their ends; of one that is longer than `limit` and its end, the rest is read and dropped."""
    # two more: a line of exactly the limit still has its line end
    while line := readline(limit + 2):
        rest = line
        while rest and not _ends(rest):
            rest = readline(HEAD_BYTES)
        yield line


def _ends(line: AnyStr) -> bool:
    return line.endswith("\n") if isinstance(line, str) else line.endswith(b"\n")


def bounded_lines(text: io.TextIOWrapper, *, max_characters: int) -> Iterator[str]:
    """Yield the lines of a text with their ends; one that is too long is a problem."""
    number = 0
    while line := text.readline(max_characters + 2):
        number += 1
        if len(line.rstrip("\r\n")) > max_characters:
            raise FormatProblem("line_too_long", pointer=f"/lines/{number}", line=number, limit=max_characters)
        yield line


def undecodable(path: Path, encoding: str) -> FormatProblem:
    """Return where a text stops being of its encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, position = 1, 0
    with path.open("rb") as stream:
        while block := stream.read(HEAD_BYTES):
            pending = len(decoder.getstate()[0])
            try:
                line += decoder.decode(block).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, "replace").count("\n")
                position += error.start - pending
                break
            position += len(block)
    return FormatProblem("text_not_encoded", line=line, byte=position + 1, encoding=encoding, known=SHOWN_ENCODINGS)


def _is_chinese(head: bytes) -> bool:
    """Return whether the bytes are Chinese of GB2312, beyond doubt.

    Korean in EUC-KR has the same pairs, but its letters end before those of the second half of the common characters;
    Japanese has kana in other rows; Big5 and Shift-JIS have second bytes below A1.
    """
    pairs: list[bytes] = _CHINESE_PAIR.findall(head)
    outside = re.sub(rb"[\x00-\x7f]+", b"", _CHINESE_PAIR.sub(b"", head[: len(head) - 1]))
    if len(pairs) < _MIN_PAIRS or len(outside) > 1 or not decodes(head, "gb18030"):
        return False
    common = sum(0xB0 <= pair[0] <= 0xD7 for pair in pairs)
    second_half = sum(0xC9 <= pair[0] <= 0xD7 for pair in pairs)
    punctuation = sum(pair[0] in (0xA1, 0xA3) for pair in pairs)
    return (common + punctuation) * 20 >= len(pairs) * 19 and second_half * 4 >= common
