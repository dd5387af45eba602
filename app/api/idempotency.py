"""`Idempotency-Key`: a create that is sent again gives the first answer instead of a second thing.

The key is a row written in the transaction that creates, so both exist or neither does: an error or a crash leaves no
key behind and the request can be sent again. The database decides between two requests of one instant: the later one
waits for the earlier one's transaction, then replays its answer, or creates when that one was rolled back.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol

from fastapi import Depends, Header
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.api.headers import IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED
from app.domain.errors import Invalid

MAX_KEY: Final = 200
_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY}}}")

HeadersOf = Callable[[Mapping[str, Any]], Mapping[str, str]]


class InvalidIdempotencyKey(Invalid):
    """The key is empty, too long or not printable ASCII."""

    code = "invalid_idempotency_key"


class IdempotencyKeyReused(Invalid):
    """The key came before, with another request."""

    code = "idempotency_key_reused"


@dataclass(frozen=True)
class StoredAnswer:
    """What the first request with a key was, and what it was answered."""

    fingerprint: str
    status_code: int
    body: Mapping[str, Any]


class IdempotencyStore(Protocol):
    """Keys in the database; bound to the session whose transaction creates."""

    async def begin(self, *, scope: str, key: str, fingerprint: str) -> StoredAnswer | None:
        """Reserve the key in this transaction and return None, or return the committed answer of an earlier request.

        Waits while another transaction holds the key (`INSERT ... ON CONFLICT DO NOTHING`, then read).
        """
        ...

    async def complete(self, *, scope: str, key: str, status_code: int, body: Mapping[str, Any]) -> None:
        """Write the answer beside the key that `begin` reserved in this transaction."""
        ...


def _no_headers(_body: Mapping[str, Any]) -> Mapping[str, str]:
    return {}


async def _read_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            alias=IDEMPOTENCY_KEY,
            description="Any text that is new for every new request, such as a UUID. The same request sent again with "
            f"the same key is answered as the first time, with `{IDEMPOTENCY_REPLAYED}: true`.",
            examples=["6f2d0a52-7d0b-4c4e-9f0e-2b8f4b8d2c11"],
        ),
    ] = None,
) -> str | None:
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise InvalidIdempotencyKey(pointer=f"{IDEMPOTENCY_KEY}:", limit=MAX_KEY)
    return idempotency_key


IdempotencyKey = Annotated[str | None, Depends(_read_key)]
"""Dependency of every create."""


async def idempotent(
    request: Request,
    store: IdempotencyStore,
    *,
    key: str | None,
    create: Callable[[], Awaitable[BaseModel]],
    status_code: int = 201,
    headers: HeadersOf = _no_headers,
    shown_once: Collection[str] = (),
) -> Response:
    """Return the answer of `create`, or the stored one when this request came before with the same key.

    `headers` derives response headers (`Location`, `ETag`) from the body, so that a replay has them too.
    `shown_once` names members that are not stored: they are null in a replay.
    """
    if key is None:
        return _answer(await _body_of(create), status_code=status_code, headers=headers)
    scope = str(request.scope["endpoint"].__name__)
    fingerprint = await _fingerprint(request)
    earlier = await store.begin(scope=scope, key=key, fingerprint=fingerprint)
    if earlier is not None:
        if earlier.fingerprint != fingerprint:
            raise IdempotencyKeyReused(pointer=f"{IDEMPOTENCY_KEY}:")
        response = _answer(earlier.body, status_code=earlier.status_code, headers=headers)
        response.headers[IDEMPOTENCY_REPLAYED] = "true"
        return response
    body = await _body_of(create)
    kept = {member: None if member in shown_once else value for member, value in body.items()}
    await store.complete(scope=scope, key=key, status_code=status_code, body=kept)
    return _answer(body, status_code=status_code, headers=headers)


async def _body_of(create: Callable[[], Awaitable[BaseModel]]) -> Mapping[str, Any]:
    body: Mapping[str, Any] = (await create()).model_dump(mode="json", by_alias=True)
    return body


async def _fingerprint(request: Request) -> str:
    digest = hashlib.sha256()
    for part in (request.method.encode(), request.url.path.encode(), request.url.query.encode(), await request.body()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _answer(body: Mapping[str, Any], *, status_code: int, headers: HeadersOf) -> Response:
    return JSONResponse(body, status_code=status_code, headers=dict(headers(body)))
