"""Creates: an `Idempotency-Key` kept in the transaction that creates."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.responses import Response

from app.api.dependencies import WriteSession
from app.api.idempotency import HeadersOf, IdempotencyKey, StoredAnswer, idempotent
from app.store import idempotency as rows


@dataclass(frozen=True)
class _KeyRows:
    """The keys of `app.store.idempotency`, bound to a session."""

    session: AsyncSession

    async def begin(self, *, scope: str, key: str, fingerprint: str) -> StoredAnswer | None:
        now = datetime.now(UTC)
        kept = await rows.reserve(self.session, scope=scope, key=key, fingerprint=fingerprint, now=now)
        if kept is None:
            return None
        return StoredAnswer(fingerprint=kept.fingerprint, status_code=kept.status_code, body=kept.body)

    async def complete(self, *, scope: str, key: str, status_code: int, body: Mapping[str, Any]) -> None:
        await rows.keep(self.session, scope=scope, key=key, status_code=status_code, body=body)


@dataclass(frozen=True)
class Creation:
    """Runs a create once per key."""

    request: Request
    session: AsyncSession
    key: str | None

    async def answer(
        self, create: Callable[[], Awaitable[BaseModel]], *, headers: HeadersOf, shown_once: Collection[str] = ()
    ) -> Response:
        """Return 201 with what `create` made in `session`, or the answer of the request that had the key first.

        The latter without the members of `shown_once`, which are secrets.
        """
        store = _KeyRows(self.session)
        return await idempotent(
            self.request, store, key=self.key, create=create, headers=headers, shown_once=shown_once
        )


async def _creation(request: Request, session: WriteSession, key: IdempotencyKey) -> Creation:
    return Creation(request=request, session=session, key=key)


CreationDep = Annotated[Creation, Depends(_creation, scope="function")]
"""Dependency of every create; its `session` is the route's `WriteSession`."""
