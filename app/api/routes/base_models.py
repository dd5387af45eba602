"""Base models: folders under `models/` that trainings start from."""

from typing import Annotated

from fastapi import Depends, Path, Response

from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router
from app.api.schemas.resources import BaseModelCreate, BaseModelRead, UnregisteredBaseModels, base_model_read
from app.domain.errors import InvalidRequest
from app.registry.base_model_card import BaseModelUnreadable, NotABaseModel
from app.registry.base_models import BaseModelInUse
from app.registry.resource_paths import InvalidPath, PathNotFound, PathOutsideFolder
from app.store.base_models import BaseModelNotFound
from app.store.methods import NameTaken

router = Router(prefix="/api/v1", tags=["base models"])

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", default="name"))]
BaseModelRef = Annotated[str, Path(description="Id or technical name.", examples=["Qwen2.5-1.5B"])]
"""`{base_model}` in the addresses."""


@router.get("/base-models", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_base_models(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    language: RequestLanguage,
    q: TextInName = None,
) -> Page[BaseModelRead]:
    """List the base models."""
    found = await services.base_models.page(session, paging, text=q)
    return paging.page([base_model_read(row, language) for row in found.rows], found.next_position)


@router.post(
    "/base-models",
    status_code=201,
    response_model=BaseModelRead,
    responses=problem_responses(
        InvalidRequest,
        NameTaken,
        PathOutsideFolder,
        InvalidPath,
        PathNotFound,
        NotABaseModel,
        BaseModelUnreadable,
        IdempotencyKeyReused,
    ),
)
async def create_base_model(
    base_model: BaseModelCreate,
    session: WriteSession,
    services: ServicesDep,
    creation: CreationDep,
    language: RequestLanguage,
) -> Response:
    """Register a folder under `models/`; its card is read from its files."""
    service = services.base_models
    prepared = await service.prepare(name=base_model.name, path=base_model.path)

    async def create() -> BaseModelRead:
        row = await service.create(session, prepared, description=base_model.description)
        return base_model_read(row, language)

    return await creation.answer(create, headers=lambda body: {"Location": f"/api/v1/base-models/{body['id']}"})


@router.get("/base-models:unregistered")
async def list_unregistered_base_models(session: ReadSession, services: ServicesDep) -> UnregisteredBaseModels:
    """List folders under `models/` that look like models and have no entry yet."""
    return UnregisteredBaseModels(items=await services.base_models.unregistered(session))


@router.get("/base-models/{base_model}", responses=problem_responses(BaseModelNotFound))
async def get_base_model(
    base_model: BaseModelRef, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> BaseModelRead:
    """Read a base model."""
    return base_model_read(await services.base_models.get(session, base_model), language)


@router.delete(
    "/base-models/{base_model}", status_code=204, responses=problem_responses(BaseModelNotFound, BaseModelInUse)
)
async def delete_base_model(base_model: BaseModelRef, session: WriteSession, services: ServicesDep) -> None:
    """Delete the entry; the folder stays."""
    await services.base_models.delete(session, base_model)
