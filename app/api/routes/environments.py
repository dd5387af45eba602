"""Environments: conda environments that stages can name. Building one is a job."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Response

from app.api.answers import ordered
from app.api.conditional import IfMatch, StaleVersion, etag_of
from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession
from app.api.errors import PreconditionRequired, problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.list_response import page_by_name
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router, needs
from app.api.schemas.common import AllowListWrite
from app.api.schemas.environments import (
    EnvironmentBuildOptions,
    EnvironmentCreate,
    EnvironmentRead,
    EnvironmentSpecReplace,
    environment_read,
)
from app.api.schemas.jobs import JobRead
from app.domain.access import Permission
from app.domain.allow_lists import AllowList
from app.domain.environment_locks import EnvironmentLock
from app.domain.errors import InvalidRequest
from app.domain.texts import Language
from app.executor.jobs.environment_builds import (
    BuildRequest,
    EnvironmentLockMissing,
    EnvironmentLockNotFound,
    EnvironmentOnNoNode,
    EnvironmentWithoutSpec,
    NoNode,
)
from app.registry.environments.allow_lists import WantedList
from app.registry.environments.service import (
    EnvironmentInUse,
    EnvironmentNotFound,
    EnvironmentNotRegistered,
    EnvironmentShipped,
    EnvironmentView,
    environment_version,
)
from app.registry.environments.specs import EnvironmentSpecUnreadable
from app.store.methods import NameTaken
from app.store.nodes import NodeNotFound

router = Router(changes=Permission.BUILD, prefix="/api/v1", tags=["environments"])

Paging = Annotated[PageParams, Depends(page_params("name", default="name"))]
EnvironmentRef = Annotated[str, Path(description="Name of the environment, as conda knows it.", examples=["trl"])]
"""`{environment}` in the addresses."""

_CHANGED = (EnvironmentNotFound, EnvironmentNotRegistered, EnvironmentShipped, PreconditionRequired, StaleVersion)


@router.get("/environments", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_environments(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    language: RequestLanguage,
    q: TextInName = None,
) -> Page[EnvironmentRead]:
    """List the environments that are registered or on a node."""
    views = await services.environments.views(session, text=q)
    return page_by_name([environment_read(view, language) for view in views], paging, name=lambda view: view.name)


@router.post(
    "/environments",
    status_code=201,
    response_model=EnvironmentRead,
    responses=problem_responses(InvalidRequest, NameTaken, EnvironmentSpecUnreadable, IdempotencyKeyReused),
)
async def create_environment(
    environment: EnvironmentCreate,
    session: WriteSession,
    services: ServicesDep,
    creation: CreationDep,
    language: RequestLanguage,
) -> Response:
    """Register an environment by name, with the spec to build it from if there is one."""

    async def create() -> EnvironmentRead:
        view = await services.environments.create(session, name=environment.name, spec=environment.spec)
        return environment_read(view, language)

    return await creation.answer(create, headers=_created_headers)


@router.get("/environments/{environment}", responses=problem_responses(EnvironmentNotFound))
async def get_environment(
    environment: EnvironmentRef,
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
    response: Response,
) -> EnvironmentRead:
    """Read an environment and its state on every node."""
    return _tagged(await services.environments.get(session, environment), response, language)


@router.put(
    "/environments/{environment}", responses=problem_responses(*_CHANGED, InvalidRequest, EnvironmentSpecUnreadable)
)
async def replace_environment(
    environment: EnvironmentRef,
    replacement: EnvironmentSpecReplace,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    language: RequestLanguage,
    response: Response,
) -> EnvironmentRead:
    """Replace the spec; nodes build the new environment when a job needs it."""
    view = await services.environments.replace_spec(session, environment, spec=replacement.spec, check=if_match.require)
    return _tagged(view, response, language)


@router.delete("/environments/{environment}", status_code=204, responses=problem_responses(*_CHANGED, EnvironmentInUse))
async def delete_environment(
    environment: EnvironmentRef, session: WriteSession, services: ServicesDep, if_match: IfMatch
) -> None:
    """Delete the entry; what was built on nodes stays there."""
    await services.environments.delete(session, environment, check=if_match.require)


@router.post(
    "/environments/{environment}:build",
    status_code=201,
    responses={
        200: {"model": JobRead, "description": "It is being built or packed already: that job."},
        **problem_responses(EnvironmentNotFound, EnvironmentWithoutSpec, NoNode, NodeNotFound, EnvironmentLockMissing),
    },
)
async def build_environment(
    environment: EnvironmentRef,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
    response: Response,
    options: EnvironmentBuildOptions | None = None,
    node: Annotated[
        str | None, Query(description="Build it on this node; id or name. Default: any that lives.")
    ] = None,
) -> JobRead:
    """Build an environment before a job needs it. A job that needs one has it built by itself.

    With `locked` exactly the packages that another node has are installed, beside what this node may have already.
    """
    options = options or EnvironmentBuildOptions()
    request = BuildRequest(node=node, locked=options.locked, lock_of=options.lock_of)
    details, is_new = await services.job_actions.build_environment(session, environment, request)
    return ordered(details, session, services, language, response, is_new=is_new)


@router.post(
    "/environments/{environment}:pack",
    status_code=201,
    responses={
        200: {"model": JobRead, "description": "It is being built or packed already: that job."},
        **problem_responses(EnvironmentNotFound, EnvironmentWithoutSpec, EnvironmentOnNoNode, NodeNotFound),
    },
)
async def pack_environment(
    environment: EnvironmentRef,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
    response: Response,
    node: Annotated[
        str | None, Query(description="Pack what this node has; id or name. Default: any that has it.")
    ] = None,
) -> JobRead:
    """Pack an environment into one file under DEEPE_HOME; nodes of the same kind then build it without a network."""
    details, is_new = await services.job_actions.pack_environment(session, environment, node=node)
    return ordered(details, session, services, language, response, is_new=is_new)


@router.get(
    "/environments/{environment}/lock",
    responses=problem_responses(EnvironmentNotFound, EnvironmentWithoutSpec, EnvironmentLockNotFound, NodeNotFound),
)
async def get_environment_lock(
    environment: EnvironmentRef,
    session: ReadSession,
    services: ServicesDep,
    node: Annotated[
        str | None, Query(description="Of this node; id or name. Default: of the one that built it last.")
    ] = None,
) -> EnvironmentLock:
    """Read exactly which packages are installed, of the present spec."""
    return await services.job_actions.environments.lock(session, environment, node=node)


def _created_headers(body: Mapping[str, Any]) -> Mapping[str, str]:
    return {
        "Location": f"/api/v1/environments/{body['name']}",
        "ETag": etag_of(environment_version(body["spec_hash"])),
    }


@router.get("/environments/{environment}/allowed", responses=problem_responses(EnvironmentNotFound))
@needs(Permission.ADMINISTER)
async def get_allowed_in_environment(
    environment: EnvironmentRef, session: ReadSession, services: ServicesDep, response: Response
) -> AllowList:
    """Read what may use the environment; empty lists: everything."""
    return _tagged_list(await services.allow_lists.of_environment(session, environment), response)


@router.put(
    "/environments/{environment}/allowed",
    responses=problem_responses(EnvironmentNotFound, InvalidRequest, PreconditionRequired, StaleVersion),
)
@needs(Permission.ADMINISTER)
async def set_allowed_in_environment(
    environment: EnvironmentRef,
    wanted: AllowListWrite,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch,
    response: Response,
) -> AllowList:
    """Say which methods and projects may use the environment. Jobs that were launched go on."""
    lists = WantedList(**wanted.model_dump())
    allowed = await services.allow_lists.set_of_environment(
        session, environment, lists, by=caller, check=if_match.require
    )
    return _tagged_list(allowed, response)


def _tagged_list(allowed: AllowList, response: Response) -> AllowList:
    response.headers["ETag"] = etag_of(allowed.version)
    return allowed


def _tagged(view: EnvironmentView, response: Response, language: Language) -> EnvironmentRead:
    response.headers["ETag"] = etag_of(view.version)
    return environment_read(view, language)
