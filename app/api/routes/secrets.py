"""Secrets: values that stages get by their names (`secret://NAME`), and that nobody can read."""

from typing import Annotated

from fastapi import Depends, Path, Response

from app.access.secrets import SecretNotFound, SecretsKeyUnusable, version_of
from app.api.conditional import IfMatch, etag_of
from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router
from app.api.schemas.secrets import SecretRead, SecretWrite, secret_read
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.store.methods import NameTaken
from app.store.tables import SecretRow

router = Router(changes=Permission.DEVELOP, prefix="/api/v1", tags=["secrets"])

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", default="name"))]
SecretRef = Annotated[str, Path(description="Name of the secret.", examples=["hub-token"], max_length=100)]
"""`{secret}` in the addresses."""


@router.get("/secrets", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_secrets(session: ReadSession, services: ServicesDep, paging: Paging) -> Page[SecretRead]:
    """List the secrets; their values are shown to nobody."""
    found = await services.secrets.page(session, paging)
    return paging.page([secret_read(row) for row in found.rows], found.next_position)


@router.get("/secrets/{secret}", responses=problem_responses(SecretNotFound))
async def get_secret(secret: SecretRef, session: ReadSession, services: ServicesDep, response: Response) -> SecretRead:
    """Read who set a secret and when, not its value."""
    return _tagged(await services.secrets.get(session, secret), response)


@router.put("/secrets/{secret}", responses=problem_responses(InvalidRequest, NameTaken, SecretsKeyUnusable))
async def set_secret(
    secret: SecretRef,
    written: SecretWrite,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch,
    response: Response,
) -> SecretRead:
    """Make a secret or give it another value; `If-Match: *` does either. Jobs that start from now on get the value."""
    row = await services.secrets.put(
        session, secret, written.value.get_secret_value(), by=caller, check=if_match.require
    )
    return _tagged(row, response)


@router.delete("/secrets/{secret}", status_code=204, responses=problem_responses(SecretNotFound))
async def delete_secret(secret: SecretRef, session: WriteSession, services: ServicesDep, if_match: IfMatch) -> None:
    """Delete a secret. Jobs that refer to it and have not started will end with `secret_missing`."""
    await services.secrets.delete(session, secret, check=if_match.require)


def _tagged(row: SecretRow, response: Response) -> SecretRead:
    response.headers["ETag"] = etag_of(version_of(row))
    return secret_read(row)
