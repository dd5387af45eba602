"""JSON that is one document: an array of objects, or an object with such an array, read item by item.

An item is cut out of the text as it is written; the check of rows parses it again, strictly.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from app.formats.base import FormatProblem, Row, Source

WRAPPERS: Final = frozenset(
    {"data", "rows", "items", "examples", "samples", "records", "instances", "entries", "dataset", "train", "数据"}
)
"""Members of an object that hold the rows of a data set. Any other may be a part of one row, as `messages` is."""

_BLOCK: Final = 256 * 1024
_NEAR_THE_END: Final = 16  # characters: the longest word or escape that can be cut in two
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_DECODER: Final = json.JSONDecoder()
_KINDS: Final = {list: "[…]", str: '"…"', int: "123", float: "1.5", bool: "true/false", type(None): "null"}


def document_rows(text: io.TextIOWrapper, source: Source, *, max_characters: int) -> Iterator[Row]:
    """Yield the objects of the document's array with the lines in which they begin."""
    window = _Window(text, max_characters)
    if window.next_character() == "[":
        yield from _items(window)
    else:
        yield from _member(window, source)
    if window.next_character():
        raise FormatProblem("json_goes_on", line=window.line())


def _items(window: "_Window") -> Iterator[Row]:
    window.take("[")
    number = 0
    closed = window.next_character() == "]"
    while not closed:
        number += 1
        window.next_character()
        line = window.line()
        item, written = window.value()
        if not isinstance(item, dict):
            raise FormatProblem("json_item_not_object", item=number, line=line, found=_KINDS[type(item)])
        yield line, _one_line(written).encode("utf-8", "surrogatepass")
        closed = window.next_character() == "]"
        if not closed:
            window.take(",")
    window.take("]")


def _one_line(written: str) -> str:
    """Return a value on one line: in JSON no string holds a line break, so what is beside one is space."""
    if "\r" in written:
        written = written.replace("\r", "\n")
    if "\n" not in written:
        return written
    return " ".join([part.strip() for part in written.split("\n")])


def _member(window: "_Window", source: Source) -> Iterator[Row]:
    """Yield the rows of the one member that holds an array of objects; the others are named in the source."""
    window.take("{")
    arrays: list[str] = []
    others: list[str] = []
    closed = window.next_character() == "}"
    while not closed:
        window.next_character()
        name, _ = window.value()
        if not isinstance(name, str):
            raise window.broken("Expecting property name")
        window.next_character()
        window.take(":")
        if window.next_character() == "[" and window.begins_with_object():
            arrays.append(name)
            if len(arrays) > 1:
                raise FormatProblem("json_several_arrays", names=", ".join(name[:40] for name in arrays))
            if name.lower() not in WRAPPERS:
                raise FormatProblem("json_array_unclear", name=name[:40])
            yield from _items(window)
        else:
            window.value()
            others.append(name)
        closed = window.next_character() == "}"
        if not closed:
            window.take(",")
    window.take("}")
    if not arrays and window.next_character():
        raise FormatProblem("json_goes_on", line=window.line())
    if not arrays:
        raise FormatProblem("json_no_array", names=", ".join(name[:40] for name in others[:10]))
    source.member = arrays[0]
    source.left_out += [name[:200] for name in others[:100]]


class _Window:
    """The part of a text that is looked at; grows while a value is longer than it."""

    def __init__(self, text: io.TextIOWrapper, max_characters: int) -> None:
        self._text = text
        self._max_characters = max_characters
        self._buffer = ""
        self._position = 0
        # line of the first character that was not counted yet: not to count from the beginning for every item
        self._line = 1
        self._counted = 0
        self._column = 1  # of the buffer's first character

    def line(self) -> int:
        """Return the line of the present position."""
        self._line += self._buffer.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def next_character(self) -> str:
        """Return the next character that is no space, without taking it; an empty text at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._position)
            assert space is not None
            self._position = space.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Step over a character that must be there."""
        if self.next_character() != character:
            raise self.broken(f"Expecting '{character}'")
        self._position += 1

    def begins_with_object(self) -> bool:
        """Return whether the array at the present position has an object as its first item."""
        while True:
            space = _SPACE.match(self._buffer, self._position + 1)
            assert space is not None
            if space.end() < len(self._buffer):
                return self._buffer[space.end()] == "{"
            if len(self._buffer) - self._position > self._max_characters or not self._more():
                return False

    def value(self) -> tuple[Any, str]:
        """Return the value at the present position and how it is written."""
        while True:
            problem, at = "", self._position
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                problem, at = error.msg, error.pos
            except RecursionError:
                raise self.broken("nested too deeply") from None
            except ValueError:
                raise self.broken("a number with too many digits") from None
            else:
                # a number may go on behind the end of the buffer
                if end < len(self._buffer) or not self._more():
                    written = self._buffer[self._position : end]
                    self._position = end
                    if len(written) > self._max_characters:
                        raise self._too_long()
                    return value, written
                continue
            unfinished = problem.startswith("Unterminated string") or at >= len(self._buffer) - _NEAR_THE_END
            if not unfinished:
                raise self.broken(problem, at)
            if len(self._buffer) - self._position > 2 * self._max_characters + _BLOCK:
                raise self._too_long()
            if not self._more():
                raise self.broken(problem, at)

    def broken(self, problem: str, at: int | None = None) -> FormatProblem:
        """Return the problem that the text is no JSON here."""
        line, column = self._place_of(self._position if at is None else at)
        return FormatProblem("json_broken", line=line, column=column, problem=problem)

    def _too_long(self) -> FormatProblem:
        line = self.line()
        return FormatProblem("line_too_long", pointer=f"/lines/{line}", line=line, limit=self._max_characters)

    def _place_of(self, position: int) -> tuple[int, int]:
        line = self.line() + self._buffer.count("\n", self._position, position)
        begins = self._buffer.rfind("\n", 0, position)
        return line, self._column + position if begins < 0 else position - begins

    def _more(self) -> bool:
        """Read on; forget what was taken."""
        block = self._text.read(max(_BLOCK, len(self._buffer) - self._position))
        if not block:
            return False
        _, self._column = self._place_of(self._position)
        self._buffer = self._buffer[self._position :] + block
        self._position = self._counted = 0
        return True
