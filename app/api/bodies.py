"""What a JSON body must be before anything looks at its contents: UTF-8, JSON, finite, storable, of bounded size.

The values are counted before they are parsed: parsing, checking and refusing a body take time by their number, and the
event loop does nothing else meanwhile.
"""

import json
import math
import re
from typing import Any, Final, NoReturn

from app.api.errors import BadRequest
from app.domain.errors import Invalid, TooLarge
from app.domain.pointers import pointer

MAX_DEPTH: Final = 64
MAX_VALUES: Final = 10_000
UNSTORABLE: Final = re.compile("[\\x00\\ud800-\\udfff]")
"""NUL and halves of surrogate pairs."""


class MalformedJson(BadRequest):
    """The body is not valid JSON. The error names the place."""

    code = "malformed_json"


class JsonNotUtf8(BadRequest):
    """The body is not UTF-8."""

    code = "json_not_utf8"


class JsonTooDeep(BadRequest):
    """The body is nested deeper than any request of this API."""

    code = "json_too_deep"


class JsonTooManyValues(TooLarge):
    """The body holds more values than any request of this API."""

    code = "json_too_many_values"


class JsonBadNumber(BadRequest):
    """The body holds NaN, Infinity, or a number that overflows to one."""

    code = "json_bad_number"


class JsonBadCharacter(Invalid):
    """NUL or half a surrogate pair: Postgres and UTF-8 have no place for them."""

    code = "json_bad_character"


def parse_json(body: bytes) -> Any:
    """Return the value of `body`; raise the typed error that says what keeps it from being JSON that we can store."""
    try:
        document = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonNotUtf8(position=error.start + 1) from None
    if _may_hold_more_values(document, MAX_VALUES):
        raise JsonTooManyValues(limit=MAX_VALUES)
    try:
        value = json.loads(document, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise MalformedJson(problem=error.msg, line=error.lineno, column=error.colno) from None
    except ValueError:  # an integer of thousands of digits
        raise JsonBadNumber(number="…") from None
    except RecursionError:
        raise JsonTooDeep(limit=MAX_DEPTH) from None
    if document.count("[") + document.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in document:  # every other spelling of these characters is refused by the decoders
        _check_characters(value, [])
    return value


def _may_hold_more_values(document: str, limit: int) -> bool:
    """Count members and items by what stands between them outside of strings; an empty array counts as one more."""
    if document.count(",") + document.count("[") + document.count("{") <= limit:
        return False
    without_escapes = document.replace("\\\\", "").replace('\\"', "")
    if without_escapes.count('"') > 4 * limit:  # a value has at most two strings: its name and itself
        return True
    outside = "".join(without_escapes.split('"')[::2])
    return outside.count(",") + outside.count("[") + outside.count("{") > limit


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise JsonTooDeep(limit=MAX_DEPTH)
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]


def _refuse_constant(constant: str) -> NoReturn:
    raise JsonBadNumber(number=constant)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise JsonBadNumber(number=number[:40])
    return value


def _check_characters(value: Any, place: list[str | int]) -> None:
    match value:
        case str():
            _check_text(value, place)
        case dict():
            for key, item in value.items():
                _check_text(key, place)
                _check_characters(item, [*place, key])
        case list():
            for index, item in enumerate(value):
                _check_characters(item, [*place, index])


def _check_text(value: str, place: list[str | int]) -> None:
    found = UNSTORABLE.search(value)
    if found:
        raise JsonBadCharacter(pointer=pointer(*place), character=f"U+{ord(found[0]):04X}")
