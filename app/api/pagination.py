"""Pages of lists: `?limit&cursor&sort` → `{"items": [...], "next_cursor": ...}`.

A cursor is the position after which the next page begins (see `app.store.paging`), tied to the sort it was made with.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Generic, TypeVar

from fastapi import Query, Request
from pydantic import ConfigDict, Field

from app.api.abilities import Ability, abilities
from app.api.bodies import UNSTORABLE
from app.api.language import RequestLanguage
from app.domain.errors import Invalid
from app.domain.values import Value
from app.store.paging import PageRequest, Position

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 200
_MAX_CURSOR: Final = 4000
_CHECKSUM_BYTES: Final = 6

ItemT = TypeVar("ItemT")

TextInName = Annotated[str | None, Query(description="Text to find in the name.", max_length=200)]
"""The parameter `q` of lists of things with a name."""


class InvalidCursor(Invalid):
    """The cursor is damaged, or belongs to another list or sort."""

    code = "invalid_cursor"


class InvalidSort(Invalid):
    """The list does not support this sort."""

    code = "invalid_sort"


class Page(Value, Generic[ItemT]):
    """One page of a list."""

    model_config = ConfigDict(json_schema_extra={"description": "One page of a list."})

    items: list[ItemT]
    next_cursor: str | None = Field(description="Give it as `cursor` to get the next page; null on the last one.")
    can: Mapping[str, Ability] = Field(
        description="What you may do with the things of this list, by `operationId`; where not, why.",
        examples=[{"create_dataset": {"allowed": True, "reason": None}}],
    )


@dataclass(frozen=True)
class PageParams(PageRequest):
    """Which page a caller wants, in which order, and what that caller can do with what is listed."""

    can: Mapping[str, Ability] = field(default_factory=dict)

    def page(self, items: Sequence[ItemT], next_position: Position | None) -> Page[ItemT]:
        """Return the page with the cursor of the next one."""
        cursor = None if next_position is None else encode_cursor(self._order, next_position)
        return Page(items=list(items), next_cursor=cursor, can=self.can)

    @property
    def _order(self) -> str:
        return f"-{self.sort}" if self.descending else self.sort


_POSITION_TYPES: Final[Mapping[str, type]] = {
    "created_at": datetime,
    "updated_at": datetime,
    "number": int,
    "rows": int,
    "size_bytes": int,
}
"""What a list is sorted by, where it is not a text."""


def page_params(*sorts: str, default: str) -> Callable[..., Awaitable[PageParams]]:
    """Return a dependency that reads `limit`, `cursor` and `sort`; `sorts` are the fields a list can be sorted by.

    `Paging = Annotated[PageParams, Depends(page_params("created_at", "name", default="-created_at"))]`
    """
    choices = [order for name in sorts for order in (name, f"-{name}")]

    async def read(
        request: Request,
        language: RequestLanguage,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Most items of the page.")] = DEFAULT_LIMIT,
        cursor: Annotated[
            str | None,
            Query(
                description="`next_cursor` of the page before.",
                json_schema_extra={"pattern": "^[A-Za-z0-9_-]+$", "maxLength": _MAX_CURSOR},
            ),
        ] = None,
        sort: Annotated[
            str,
            Query(
                description="Field to sort by; a minus in front: descending.",
                json_schema_extra={"enum": choices, "x-enum-varnames": [_member_name(order) for order in choices]},
            ),
        ] = default,
    ) -> PageParams:
        if sort not in choices:
            raise InvalidSort(pointer="?sort", given=sort, allowed=", ".join(sorts))
        after = None if cursor is None else decode_cursor(sort, cursor)
        return PageParams(
            limit=limit,
            sort=sort.removeprefix("-"),
            descending=sort.startswith("-"),
            after=after,
            can=abilities(request, language),
        )

    return read


def _member_name(order: str) -> str:
    """Return what generated clients call the order: they have no names for a minus."""
    name = order.removeprefix("-").upper()
    return f"{name}_DESCENDING" if order.startswith("-") else name


def encode_cursor(order: str, position: Position) -> str:
    """Return an opaque text for `position` in the list sorted by `order`."""
    document = json.dumps([order, *map(_pack, position)], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_checksum(document) + document).decode().rstrip("=")


def decode_cursor(order: str, cursor: str) -> Position:
    """Return the position; a damaged or forged cursor, or one of another order, is `InvalidCursor`."""
    try:
        if len(cursor) > _MAX_CURSOR:
            raise ValueError("too long")
        decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        checksum, document = decoded[:_CHECKSUM_BYTES], decoded[_CHECKSUM_BYTES:]
        if checksum != _checksum(document):
            raise ValueError("damaged")
        of_order, value, tie = json.loads(document)
        if of_order != order:
            raise ValueError("made for another order")
        return _unpack(value, _POSITION_TYPES.get(order.removeprefix("-"), str)), _unpack(tie, str)
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError):
        raise InvalidCursor(pointer="?cursor") from None


def _checksum(document: bytes) -> bytes:
    """Compute the checksum that detects a damaged cursor."""
    return hashlib.blake2b(document, digest_size=_CHECKSUM_BYTES, person=b"deepe-cursor").digest()


def _pack(value: Any) -> Any:
    if isinstance(value, datetime):
        return {"t": value.astimezone(UTC).isoformat()}
    return value


def _unpack(value: Any, wanted: type) -> Any:
    """Return the value if the database can compare it with its column; any caller can make the checksum."""
    match value:
        case {"t": str(moment)} if wanted is datetime:
            parsed = datetime.fromisoformat(moment)
            if parsed.tzinfo != UTC:
                raise ValueError("not in the zone of ours")
            return parsed
        case int() if wanted is int and not isinstance(value, bool) and abs(value) < 2**63:
            return value
        case str() if wanted is str and UNSTORABLE.search(value) is None:
            return value
        case _:
            raise ValueError("no position")
