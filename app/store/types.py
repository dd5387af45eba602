"""Column types shared by all tables, and the form in which text and JSON reach the database."""

import json
import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa

from app.domain.plain_text import storable, storable_document

# as JSON spells NUL and the halves of a surrogate pair; whole pairs are found as well and stay what they are
_SUSPECT: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_DECODER: Final = json.JSONDecoder(parse_constant=lambda _constant: None)


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Timezone-aware UTC on both databases; SQLite itself forgets the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime: times are timezone-aware UTC everywhere")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def enum_type(enum: type[StrEnum]) -> "sa.Enum":
    """Store the value in a VARCHAR, load the enum member, refuse other values."""
    return sa.Enum(
        enum,
        native_enum=False,
        length=32,
        validate_strings=True,
        create_constraint=False,
        values_callable=lambda members: [member.value for member in members],
    )


JsonDocument: sa.types.TypeEngine[Any] = sa.JSON(none_as_null=True)


def dump_json(value: Any) -> str:
    """Write a JSON document. What a database or a reader would refuse in it is replaced (`storable_document`)."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(storable_document(value), allow_nan=False)
    return json.dumps(storable_document(value)) if _SUSPECT.search(text) else text


def load_json(text: str) -> Any:
    """Read a JSON document. One that was written before `dump_json` replaced anything is made sendable here."""
    if text == "{}":  # most of what a job keeps
        return {}
    value = _DECODER.decode(text)
    return storable_document(value) if _SUSPECT.search(text) else value


def storable_parameters(parameters: Any) -> Any:
    """Return the bound values of a statement, texts in the form that databases accept."""
    match parameters:
        case str():
            return parameters if parameters.isascii() and "\0" not in parameters else storable(parameters)
        case dict():
            return {name: storable_parameters(value) for name, value in parameters.items()}
        case tuple():
            return tuple(storable_parameters(value) for value in parameters)
        case list():
            return [storable_parameters(value) for value in parameters]
        case _:
            return parameters
