"""`ETag` and `If-Match`: a change names the version it was made from, so nothing unread is overwritten."""

import re
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Header

from app.api.errors import PreconditionRequired
from app.api.headers import IF_MATCH
from app.domain.errors import Invalid, PreconditionFailed

_TAG: Final = re.compile(r'(?:W/)?"([A-Za-z0-9._:-]{1,100})"|([A-Za-z0-9._:-]{1,100})')


class InvalidIfMatch(Invalid):
    """`If-Match` holds no ETag of this service."""

    code = "invalid_if_match"


class StaleVersion(PreconditionFailed):
    """The resource was changed after the caller read it."""

    code = "stale_version"


@dataclass(frozen=True)
class Precondition:
    """The versions that the caller read; None stands for `*`, any."""

    versions: frozenset[str] | None

    def require(self, current: int | str) -> None:
        """Raise `StaleVersion` unless the caller read `current`; call it in the transaction that changes."""
        if self.versions is not None and str(current) not in self.versions:
            raise StaleVersion(given=", ".join(sorted(self.versions)), current=str(current))

    @property
    def version(self) -> int | None:
        """The one version number that was read; None for `*` and for anything that is no single number."""
        if self.versions is None or len(self.versions) != 1:
            return None
        (only,) = self.versions
        return int(only) if only.isdecimal() else None


def etag_of(version: int | str) -> str:
    """Return the strong ETag of a version."""
    return f'"{version}"'


def parse_if_match(header: str | None) -> Precondition:
    """Return what `If-Match` demands. Weak and unquoted tags are taken too: proxies weaken, people forget quotes."""
    if header is None or not header.strip():
        raise PreconditionRequired
    if header.strip() == "*":
        return Precondition(versions=None)
    tags = [_TAG.fullmatch(tag.strip()) for tag in header.split(",")]
    if any(tag is None for tag in tags):
        raise InvalidIfMatch(pointer=f"{IF_MATCH}:")
    return Precondition(versions=frozenset(tag[1] or tag[2] for tag in tags if tag))


async def _if_match(
    if_match: Annotated[
        str | None,
        Header(
            alias=IF_MATCH,
            description='The `ETag` of the version that was read, like `"3"`; `*` for any. Without it: 428.',
            examples=['"3"'],
        ),
    ] = None,
) -> Precondition:
    return parse_if_match(if_match)


IfMatch = Annotated[Precondition, Depends(_if_match)]
"""Dependency of every PUT, PATCH and DELETE of something that has versions."""
