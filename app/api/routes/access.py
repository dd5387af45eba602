"""Who calls, and the API keys that give callers a name and a role."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request, Response

from app.access.keys import NewKey, version_of
from app.api.conditional import IfMatch, etag_of
from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_entries, problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router, needs
from app.api.schemas.access import KeyChange, KeyCreate, KeyRead, Login, Me, key_read, me_read
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.store.access_keys import AccessKeyNotFound
from app.store.methods import NameTaken
from app.store.tables import AccessKeyRow

router = Router(changes=Permission.MANAGE, reads=Permission.MANAGE, prefix="/api/v1", tags=["access"])

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", default="name"))]
KeyRef = Annotated[str, Path(description="Id or name of the key.", examples=["nightly-training"], max_length=100)]
"""`{key}` in the addresses."""


@router.get("/login")
@needs(None)
async def get_login(request: Request) -> Login:
    """Say how people log in; needs no token."""
    login: Login = request.app.state.login
    return login


@router.get("/me")
@needs(Permission.READ)
async def get_me(caller: CallerDep, request: Request, language: RequestLanguage) -> Me:
    """Say who you are to the service, and what you may do."""
    return me_read(caller, problem_entries(request.app.state.notices(), language))


@router.get("/keys", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_keys(
    session: ReadSession,
    services: ServicesDep,
    caller: CallerDep,
    paging: Paging,
    revoked: Annotated[bool, Query(description="Those as well that were revoked.")] = False,
) -> Page[KeyRead]:
    """List the API keys; their secrets are not shown."""
    found = await services.access_keys.page(session, paging, caller=caller, revoked=revoked)
    return paging.page([key_read(row) for row in found.rows], found.next_position)


@router.post(
    "/keys",
    status_code=201,
    response_model=KeyRead,
    responses=problem_responses(InvalidRequest, NameTaken, IdempotencyKeyReused),
)
async def create_key(
    key: KeyCreate, session: WriteSession, services: ServicesDep, caller: CallerDep, creation: CreationDep
) -> Response:
    """Make an API key. Only the first response shows its secret.

    It opens the project that the address names, and no other; without one its role is one in the installation.
    """

    async def create() -> KeyRead:
        row, secret = await services.access_keys.create(session, NewKey(**key.model_dump()), by=caller)
        return key_read(row, secret)

    return await creation.answer(
        create, headers=lambda body: {"Location": f"/api/v1/keys/{body['id']}"}, shown_once=("secret",)
    )


@router.get("/keys/{key}", responses=problem_responses(AccessKeyNotFound))
async def get_key(
    key: KeyRef, session: ReadSession, services: ServicesDep, caller: CallerDep, response: Response
) -> KeyRead:
    """Read an API key, by its id also one that was revoked."""
    return _tagged(await services.access_keys.get(session, key, caller=caller), response)


@router.patch("/keys/{key}", responses=problem_responses(AccessKeyNotFound, InvalidRequest, NameTaken))
async def update_key(
    key: KeyRef,
    change: KeyChange,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch,
    response: Response,
) -> KeyRead:
    """Change name, role or expiry of an API key, from its next request on; its secret stays."""
    row = await services.access_keys.change(session, key, change.changes(), caller=caller, check=if_match.require)
    return _tagged(row, response)


@router.post("/keys/{key}:rotate", responses=problem_responses(AccessKeyNotFound))
async def rotate_key(
    key: KeyRef, session: WriteSession, services: ServicesDep, caller: CallerDep, response: Response
) -> KeyRead:
    """Give an API key a new secret, which is shown once. The old one ends with its next request.

    It takes no `If-Match`: whoever lost the answer sends it again.
    """
    row, secret = await services.access_keys.rotate(session, key, caller=caller)
    return _tagged(row, response, secret)


@router.delete("/keys/{key}", status_code=204, responses=problem_responses(AccessKeyNotFound))
async def revoke_key(
    key: KeyRef, session: WriteSession, services: ServicesDep, caller: CallerDep, if_match: IfMatch
) -> None:
    """Revoke an API key for good. It stays listed as revoked, and its name may be used again."""
    await services.access_keys.revoke(session, key, caller=caller, check=if_match.require)


def _tagged(row: AccessKeyRow, response: Response, secret: str | None = None) -> KeyRead:
    response.headers["ETag"] = etag_of(version_of(row))
    return key_read(row, secret)
