"""Projects, and who works in the one that the address names."""

from typing import Annotated

from fastapi import Depends, Query, Response

from app.access.guard import ProjectLimitReached
from app.access.projects import version_of
from app.api.conditional import IfMatch, etag_of
from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router, needs
from app.api.schemas.projects import (
    LimitsWrite,
    MemberRead,
    Members,
    MemberWrite,
    ProjectChange,
    ProjectCreate,
    ProjectDetails,
    ProjectRead,
    member_read,
    project_details,
    project_read,
)
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.store.methods import NameTaken
from app.store.projects import MemberNotFound
from app.store.session import within

router = Router(changes=Permission.MANAGE, prefix="/api/v1", tags=["projects"])

Paging = Annotated[PageParams, Depends(page_params("id", "created_at", default="id"))]


@router.get("/projects", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_projects(
    session: ReadSession, services: ServicesDep, caller: CallerDep, paging: Paging
) -> Page[ProjectRead]:
    """List the projects that you may enter."""
    found = await services.projects.page(session, paging, caller=caller)
    return paging.page([project_read(row) for row in found.rows], found.next_position)


@router.post(
    "/projects",
    status_code=201,
    response_model=ProjectRead,
    responses=problem_responses(InvalidRequest, NameTaken, ProjectLimitReached, IdempotencyKeyReused),
)
@needs(Permission.ADMINISTER)
async def create_project(
    project: ProjectCreate, session: WriteSession, services: ServicesDep, caller: CallerDep, creation: CreationDep
) -> Response:
    """Make a project with the shipped methods and samples; its address is `/projects/{id}`."""

    async def create() -> ProjectRead:
        row = await services.projects.create(session, project.id, title=project.title, by=caller)
        own = services.of(row.id)
        own.home.create()
        async with within(session, own.database.scope):
            await own.methods.presets.install_presets(session)
        return project_read(row)

    return await creation.answer(create, headers=lambda body: {"Location": f"/projects/{body['id']}/api/v1/project"})


@router.get("/project")
async def get_project(
    session: ReadSession, services: ServicesDep, caller: CallerDep, response: Response
) -> ProjectDetails:
    """Read the project that the address names; without one, `default`."""
    row = await services.projects.get(session, caller)
    response.headers["ETag"] = etag_of(version_of(row))
    return project_details(row, await services.projects.use(session, caller))


@router.put("/project/limits", responses=problem_responses(InvalidRequest))
@needs(Permission.ADMINISTER)
async def set_project_limits(
    limits: LimitsWrite,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch,
    response: Response,
) -> ProjectDetails:
    """Say what the project may use from now on. What it uses beyond that goes on."""
    row = await services.projects.set_limits(session, caller, limits, check=if_match.require)
    response.headers["ETag"] = etag_of(version_of(row))
    return project_details(row, await services.projects.use(session, caller))


@router.patch("/project", responses=problem_responses(InvalidRequest))
async def update_project(
    change: ProjectChange,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch,
    response: Response,
) -> ProjectRead:
    """Give the project another title."""
    row = await services.projects.change(session, caller, title=change.title, check=if_match.require)
    response.headers["ETag"] = etag_of(version_of(row))
    return project_read(row)


@router.get("/members")
async def list_members(session: ReadSession, services: ServicesDep, caller: CallerDep) -> Members:
    """List who has a role in this project. Administrators of the installation have one in each."""
    return Members(items=[member_read(row) for row in await services.projects.members(session, caller)])


@router.put("/members", responses=problem_responses(InvalidRequest))
async def set_member(
    member: MemberWrite, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> MemberRead:
    """Give somebody a role in this project, in the place of the one they had; it counts from their next request."""
    row = await services.projects.set_member(session, caller, member.principal, role=member.role, name=member.name)
    return member_read(row)


@router.delete("/members", status_code=204, responses=problem_responses(MemberNotFound))
async def remove_member(
    principal: Annotated[str, Query(max_length=300, description="`principal` of the member.")],
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
) -> None:
    """Take somebody out of this project; their next request finds no such project."""
    await services.projects.remove_member(session, caller, principal)
