"""`Idempotency-Key`: a repeated create returns the first response and creates nothing.

The key is a row written in the transaction that creates, so both exist or neither does: an error or a crash leaves no
key behind and the request can be sent again. The database decides between two requests of one instant: the later one
waits for the earlier one's transaction, then replays its answer, or creates when that one was rolled back.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Depends, Header
from pydantic import BaseModel
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.api.dependencies import WriteSession
from app.api.guards import PROJECT
from app.api.headers import IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED
from app.domain.errors import Invalid
from app.domain.projects import DEFAULT_PROJECT
from app.store import idempotency as rows

MAX_KEY: Final = 200
_CREATED: Final = 201
_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY}}}")

HeadersOf = Callable[[Mapping[str, Any]], Mapping[str, str]]


class InvalidIdempotencyKey(Invalid):
    """The key is empty, too long or not printable ASCII."""

    code = "invalid_idempotency_key"


class IdempotencyKeyReused(Invalid):
    """The key was used before with a different request."""

    code = "idempotency_key_reused"


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


@dataclass(frozen=True)
class Creation:
    """Runs a create once per key, in the transaction of the route's `WriteSession`."""

    request: Request
    session: AsyncSession
    key: str | None

    def _scope(self) -> str:
        project, operation = self.request.scope.get(PROJECT), self.request.scope["endpoint"].__name__
        return str(operation if project in (None, DEFAULT_PROJECT) else f"{project}:{operation}")

    async def answer(
        self, create: Callable[[], Awaitable[BaseModel]], *, headers: HeadersOf, shown_once: Collection[str] = ()
    ) -> Response:
        """Return 201 with what `create` made, or the answer of the request that had the key first.

        `headers` derives response headers (`Location`, `ETag`) from the body, so that a replay has them too.
        `shown_once` names members that are not stored: they are null in a replay.
        """
        if self.key is None:
            return _answer(await _body_of(create), headers=headers)
        operation = {"scope": self._scope(), "key": self.key}
        fingerprint = await _fingerprint(self.request)
        earlier = await rows.reserve(self.session, **operation, fingerprint=fingerprint, now=datetime.now(UTC))
        if earlier is not None:
            if earlier.fingerprint != fingerprint:
                raise IdempotencyKeyReused(pointer=f"{IDEMPOTENCY_KEY}:")
            response = _answer(earlier.body, headers=headers, status_code=earlier.status_code)
            response.headers[IDEMPOTENCY_REPLAYED] = "true"
            return response
        body = await _body_of(create)
        kept = {member: None if member in shown_once else value for member, value in body.items()}
        await rows.keep(self.session, **operation, status_code=_CREATED, body=kept)
        return _answer(body, headers=headers)


async def _creation(
    request: Request, session: WriteSession, key: Annotated[str | None, Depends(_read_key)]
) -> Creation:
    return Creation(request=request, session=session, key=key)


CreationDep = Annotated[Creation, Depends(_creation, scope="function")]
"""Dependency of every create; its `session` is the route's `WriteSession`."""


async def _body_of(create: Callable[[], Awaitable[BaseModel]]) -> Mapping[str, Any]:
    body: Mapping[str, Any] = (await create()).model_dump(mode="json", by_alias=True)
    return body


async def _fingerprint(request: Request) -> str:
    digest = hashlib.sha256()
    for part in (request.method.encode(), request.url.path.encode(), request.url.query.encode(), await request.body()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _answer(body: Mapping[str, Any], *, headers: HeadersOf, status_code: int = _CREATED) -> Response:
    return JSONResponse(body, status_code=status_code, headers=dict(headers(body)))
