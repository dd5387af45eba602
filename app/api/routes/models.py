"""Models that jobs made or people registered: list, lineage, files, delete."""

from typing import Annotated

from fastapi import Depends, Path, Query, Response
from fastapi.responses import StreamingResponse

from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.downloads import (
    ARCHIVE_RESPONSES,
    FILE_RESPONSES,
    ByteRange,
    FileDownload,
    ModelFilePath,
    archive_answer,
    file_answer,
)
from app.api.errors import RangeNotSatisfiable, problem_entries, problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router, needs
from app.api.schemas.models import (
    ModelCreate,
    ModelFileList,
    ModelRead,
    ModelSummary,
    ModelValidation,
    model_files,
    model_read,
    model_summary,
)
from app.domain.access import Permission
from app.domain.enums import ModelState, TrainingType
from app.domain.errors import InvalidRequest
from app.registry.models.folders import ModelFileNotFound
from app.registry.models.service import ModelInUse
from app.registry.models.serving_tools import DeployTargetUnreachable
from app.store.models import ModelFilter, ModelNameAmbiguous, ModelNotFound

router = Router(changes=Permission.RUN, prefix="/api/v1", tags=["models"])

Paging = Annotated[PageParams, Depends(page_params("created_at", "name", "size_bytes", default="-created_at"))]
ModelRef = Annotated[
    str, Path(description="Id or name of the model.", examples=["5b0e4c1e-9f3d-4a59-8f5e-0d6f3f8f2a11"])
]
"""`{model}` in the addresses."""

_NAMED = (ModelNotFound, ModelNameAmbiguous)


@router.get("/models", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_models(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    state: Annotated[ModelState | None, Query(description="Only models in this state.")] = None,
    training_type: Annotated[TrainingType | None, Query(description="Only models of this type.")] = None,
    base_model: Annotated[str | None, Query(description="Only models made from it; id or name.")] = None,
    method: Annotated[str | None, Query(description="Only models that it made; id or name.")] = None,
    dataset: Annotated[str | None, Query(description="Only models trained on it; id or name.")] = None,
    q: TextInName = None,
) -> Page[ModelSummary]:
    """List the models."""
    wanted = ModelFilter(
        state=state,
        training_type=training_type,
        base_model=base_model,
        method_id=await services.models.method_id_of(session, method),
        dataset=dataset,
        text=q,
    )
    found = await services.models.page(session, wanted, paging)
    return paging.page([model_summary(row) for row in found.rows], found.next_position)


@router.post(
    "/models",
    status_code=201,
    response_model=ModelRead,
    responses=problem_responses(InvalidRequest, IdempotencyKeyReused),
)
async def register_model(
    model: ModelCreate,
    session: WriteSession,
    services: ServicesDep,
    creation: CreationDep,
    language: RequestLanguage,
) -> Response:
    """Register a model that was made elsewhere, with what it comes from. Its files are checked and stay where they are.

    They also stay when the model is deleted here.
    """
    wanted = model.wanted()
    looked = await services.model_registration.look(wanted)

    async def create() -> ModelRead:
        row = await services.model_registration.register(session, wanted, looked)
        return model_read(await services.models.lineage(session, row.id), language)

    return await creation.answer(create, headers=lambda body: {"Location": f"/api/v1/models/{body['id']}"})


@router.post("/models:validate")
@needs(Permission.READ)
async def validate_model(
    model: ModelCreate, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> ModelValidation:
    """Say everything that registering would say; nothing is changed."""
    wanted = model.wanted()
    looked = await services.model_registration.look(wanted)
    found = await services.model_registration.violations(session, wanted, looked)
    kind = None if looked.artifact is None else looked.artifact.kind
    return ModelValidation(valid=not found, kind=kind, violations=problem_entries(found, language))


@router.get("/models/{model}", responses=problem_responses(*_NAMED))
async def get_model(
    model: ModelRef, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> ModelRead:
    """Read a model and everything it comes from and became."""
    return model_read(await services.models.lineage(session, model), language)


@router.get("/models/{model}/files", responses=problem_responses(*_NAMED))
async def list_model_files(model: ModelRef, session: ReadSession, services: ServicesDep) -> ModelFileList:
    """List the files of a model; an online model has none here."""
    row = await services.models.get(session, model)
    return model_files(await services.models.files(row))


@router.get(
    "/models/{model}/files/{path:path}",
    response_class=FileDownload,
    responses={**FILE_RESPONSES, **problem_responses(*_NAMED, ModelFileNotFound, RangeNotSatisfiable)},
)
async def get_model_file(
    model: ModelRef,
    path: ModelFilePath,
    session: ReadSession,
    services: ServicesDep,
    wanted: ByteRange = None,
) -> FileDownload:
    """Read a file of a model, or the part of it that `Range` names."""
    row = await services.models.get(session, model)
    return await file_answer(await services.models.file(row, path), path, wanted)


@router.get(
    "/models/{model}/archive",
    response_class=StreamingResponse,
    responses={**ARCHIVE_RESPONSES, **problem_responses(*_NAMED, ModelFileNotFound)},
)
async def get_model_archive(model: ModelRef, session: ReadSession, services: ServicesDep) -> StreamingResponse:
    """Read all files of a model as one tar; its size is known beforehand."""
    row = await services.models.get(session, model)
    return archive_answer(await services.models.archive(row), row.name)


@router.delete(
    "/models/{model}", status_code=204, responses=problem_responses(*_NAMED, ModelInUse, DeployTargetUnreachable)
)
async def delete_model(
    model: ModelRef,
    services: ServicesDep,
    without_unloading: Annotated[
        bool, Query(description="Online models: delete the entry and leave the serving tool alone.")
    ] = False,
) -> None:
    """Delete a model: a customized one loses its adapter, a complete one its folder, an online one is unloaded first.

    Models made from it stay, and the files of one that was made elsewhere and registered.
    """
    await services.models.delete(model, without_unloading=without_unloading)
