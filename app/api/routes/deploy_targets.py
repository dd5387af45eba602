"""Deploy targets: configured places where online models are served."""

from typing import Annotated

from fastapi import Depends, Path, Response

from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router, needs
from app.api.schemas.deploy_targets import (
    DeployTargetAnswer,
    DeployTargetCreate,
    DeployTargetPatch,
    DeployTargetRead,
    deploy_target_read,
)
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.registry.models.deploy_targets import DeployTargetInUse, NewDeployTarget
from app.store.deploy_targets import DeployTargetNotFound
from app.store.methods import NameTaken

router = Router(changes=Permission.DEVELOP, prefix="/api/v1", tags=["deploy targets"])

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", default="name"))]
DeployTargetRef = Annotated[str, Path(description="Id or name of the deploy target.", examples=["gpu-box"])]
"""`{deploy_target}` in the addresses."""


@router.get("/deploy-targets", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_deploy_targets(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    q: TextInName = None,
) -> Page[DeployTargetRead]:
    """List the configured deploy targets; `custom` is always there and not listed."""
    found = await services.deploy_targets.page(session, paging, text=q)
    return paging.page([deploy_target_read(row) for row in found.rows], found.next_position)


@router.post(
    "/deploy-targets",
    status_code=201,
    response_model=DeployTargetRead,
    responses=problem_responses(InvalidRequest, NameTaken, IdempotencyKeyReused),
)
async def create_deploy_target(
    target: DeployTargetCreate, session: WriteSession, services: ServicesDep, creation: CreationDep
) -> Response:
    """Configure a deploy target."""

    async def create() -> DeployTargetRead:
        row = await services.deploy_targets.create(session, NewDeployTarget(**target.model_dump()))
        return deploy_target_read(row)

    return await creation.answer(create, headers=lambda body: {"Location": f"/api/v1/deploy-targets/{body['id']}"})


@router.get("/deploy-targets/{deploy_target}", responses=problem_responses(DeployTargetNotFound))
async def get_deploy_target(
    deploy_target: DeployTargetRef, session: ReadSession, services: ServicesDep
) -> DeployTargetRead:
    """Read a deploy target."""
    return deploy_target_read(await services.deploy_targets.get(session, deploy_target))


@router.patch("/deploy-targets/{deploy_target}", responses=problem_responses(DeployTargetNotFound, InvalidRequest))
async def update_deploy_target(
    deploy_target: DeployTargetRef, patch: DeployTargetPatch, session: WriteSession, services: ServicesDep
) -> DeployTargetRead:
    """Change members of a deploy target (JSON merge patch, RFC 7396): null removes a member.

    Address and settings hold for deployments that are submitted from now on. Jobs and online models keep theirs, and
    versions of methods keep the file and the environment that they copied.
    """
    changes = patch.model_dump(exclude_unset=True)
    return deploy_target_read(await services.deploy_targets.change(session, deploy_target, changes))


@router.post("/deploy-targets/{deploy_target}:test", responses=problem_responses(DeployTargetNotFound))
@needs(Permission.RUN)
async def test_deploy_target(
    deploy_target: DeployTargetRef, services: ServicesDep, language: RequestLanguage
) -> DeployTargetAnswer:
    """Ask the server of a deploy target for its start page, from where the service runs."""
    async with services.database.reading() as session:
        row = await services.deploy_targets.get(session, deploy_target)
    answer = await services.deploy_targets.test(row)
    return DeployTargetAnswer(usable=answer.usable, status=answer.status, detail=answer.finding.detail(language))


@router.delete(
    "/deploy-targets/{deploy_target}",
    status_code=204,
    responses=problem_responses(DeployTargetNotFound, DeployTargetInUse),
)
async def delete_deploy_target(deploy_target: DeployTargetRef, session: WriteSession, services: ServicesDep) -> None:
    """Delete a deploy target that no method names."""
    await services.deploy_targets.delete(session, deploy_target)
