"""Training methods: create, read, list, change, copy, delete; their versions, files and readiness."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Request, Response

from app.access.guard import CommercialLicenseRequired
from app.api.answers import preview_answer
from app.api.conditional import IfMatch, StaleVersion, etag_of
from app.api.dependencies import ReadSession, ServicesDep, WriteSession, notify_after_commit
from app.api.errors import PreconditionRequired, problem_responses
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router, licensed, needs
from app.api.schemas.method_parameters import MethodParameters, parameters_read
from app.api.schemas.methods import (
    MethodCopy,
    MethodPatch,
    MethodRead,
    MethodSummary,
    MethodValidation,
    MethodVersionRead,
    MethodVersionSummary,
    method_read,
    method_summary,
    method_version_read,
    method_version_summary,
    validation_read,
    writable,
)
from app.api.schemas.previews import PreviewRead, RowsPreview, preview_read
from app.api.schemas.readiness import MethodReadinessRead, ReadinessRead, method_readiness_read, readiness_read
from app.api.schemas.stage_commands import StageCommandRead, stage_command_read
from app.domain.access import Permission
from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind, TrainingType
from app.domain.errors import InvalidRequest
from app.domain.form import MethodForm
from app.executor.jobs.row_previews import PREVIEW_ERRORS
from app.executor.jobs.stage_commands import WantedCommand
from app.executor.jobs.submission import InsufficientDiskSpace
from app.registry.datasets.service import DatasetMissing, InvalidDataset
from app.registry.methods.preset_install import PresetNotFound
from app.registry.methods.record import Method, version_tag
from app.registry.methods.restoring import FileInTheWay, NotATemplate
from app.registry.methods.service import JobsChoice, MethodHasLiveJobs, MethodMoved, PresetReadOnly
from app.store.methods import MethodFilter, MethodNotFound, MethodVersionNotFound, NameTaken
from app.store.models import ModelNotFound

router = Router(changes=Permission.DEVELOP, prefix="/api/v1", tags=["methods"])

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", "updated_at", default="name"))]
VersionPaging = Annotated[PageParams, Depends(page_params("number", default="-number"))]
MethodRef = Annotated[str, Path(description="Id or name of the method.", examples=["SFT-Demo"])]
"""`{method}` in the addresses."""

_CHANGED: Final = (MethodNotFound, PreconditionRequired, StaleVersion, MethodMoved)


@router.get("/methods", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_methods(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    training_type: Annotated[TrainingType | None, Query(description="Only methods that train such models.")] = None,
    technique: Annotated[str | None, Query(description="Only methods with this label.", examples=["sft"])] = None,
    lifecycle: Annotated[
        str | None,
        Query(description="Only methods with exactly this path.", examples=["customized,complete"], max_length=64),
    ] = None,
    q: Annotated[str | None, Query(description="Text to find in name and description.", max_length=200)] = None,
) -> Page[MethodSummary]:
    """List the methods."""
    wanted = MethodFilter(training_type=training_type, technique=technique, lifecycle=lifecycle, text=q)
    methods, following = await services.methods.registry.page(session, wanted, paging)
    return paging.page([method_summary(method) for method in methods], following)


@router.post(
    "/methods",
    status_code=201,
    response_model=MethodRead,
    responses=problem_responses(InvalidRequest, NameTaken, CommercialLicenseRequired, IdempotencyKeyReused),
)
@licensed
async def create_method(
    definition: MethodDefinition, session: WriteSession, services: ServicesDep, creation: CreationDep
) -> Response:
    """Add a method (commercial licence). Everything that is wrong with it comes at once."""
    await services.methods.registry.read_commit(definition)  # before the session's transaction begins

    async def create() -> MethodRead:
        return await _read(services, await services.methods.registry.create(session, writable(definition)))

    return await creation.answer(create, headers=_created_headers)


@router.post("/methods:validate", responses=problem_responses(MethodNotFound))
@needs(Permission.READ)
async def validate_method(
    definition: MethodDefinition,
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
    method: Annotated[
        str | None, Query(description="Id or name of the method that this would replace; its name is then not taken.")
    ] = None,
) -> MethodValidation:
    """Say what creating the method would say, and what it is not ready for; nothing is changed, no licence needed."""
    found, ready = await services.methods.guide.validate(session, writable(definition), instead_of=method)
    return validation_read(found, ready, language)


@router.get("/method-form")
async def get_method_form(session: ReadSession, services: ServicesDep) -> MethodForm:
    """Return what a form for methods is made of: fields, stars and labels per lifecycle, from the rules themselves."""
    return await services.methods.guide.form(session)


@router.get("/methods/{method}", responses=problem_responses(MethodNotFound))
async def get_method(method: MethodRef, session: ReadSession, services: ServicesDep, response: Response) -> MethodRead:
    """Read a method and how its files stand on disk."""
    return await tagged_method(services, await services.methods.registry.get(session, method), response)


@router.put(
    "/methods/{method}",
    responses=problem_responses(*_CHANGED, InvalidRequest, NameTaken, PresetReadOnly, CommercialLicenseRequired),
)
async def replace_method(
    method: MethodRef,
    definition: MethodDefinition,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    response: Response,
) -> MethodRead:
    """Replace a method; makes a new version if anything differs."""
    await services.methods.registry.read_commit(definition)
    changed = await services.methods.registry.replace(
        session, method, writable(definition), precondition=if_match.require
    )
    return await tagged_method(services, changed, response)


async def _merge_patch(request: Request, _patch: MethodPatch) -> Mapping[str, Any]:
    """Return the body as it was sent (null removes), once its members have been found to be of the right types."""
    changes: Mapping[str, Any] = await request.json()
    return changes


@router.patch(
    "/methods/{method}",
    responses=problem_responses(*_CHANGED, InvalidRequest, NameTaken, PresetReadOnly, CommercialLicenseRequired),
)
async def update_method(
    method: MethodRef,
    changes: Annotated[Mapping[str, Any], Depends(_merge_patch)],
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    response: Response,
) -> MethodRead:
    """Change members of a method (JSON merge patch, RFC 7396): null removes a member."""
    if changes.get("repository"):
        async with services.database.reading() as before:
            merged = await services.methods.registry.merged(before, method, changes)
        await services.methods.registry.read_commit(merged)
    changed = await services.methods.registry.patch(session, method, changes, precondition=if_match.require)
    return await tagged_method(services, changed, response)


@router.delete(
    "/methods/{method}",
    status_code=204,
    responses=problem_responses(*_CHANGED, MethodHasLiveJobs, CommercialLicenseRequired),
)
@licensed
async def delete_method(
    method: MethodRef,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    jobs: Annotated[JobsChoice | None, Query(description="What to do with its queued and running jobs.")] = None,
) -> None:
    """Delete a method (commercial licence). Its jobs, models and versions stay; a preset stays away."""
    cancelled = await services.methods.registry.delete(session, method, precondition=if_match.require, jobs=jobs)
    for job_id in cancelled:
        notify_after_commit(session, services.notifier, job_id)


@router.post(
    "/methods/{method}:copy",
    status_code=201,
    response_model=MethodRead,
    responses=problem_responses(
        MethodNotFound, InvalidRequest, NameTaken, CommercialLicenseRequired, IdempotencyKeyReused
    ),
)
@licensed
async def copy_method(
    method: MethodRef,
    copy: MethodCopy,
    session: WriteSession,
    services: ServicesDep,
    creation: CreationDep,
) -> Response:
    """Copy a method with its scripts (commercial licence): adapting the copy does not change the original."""

    async def create() -> MethodRead:
        return await _read(services, await services.methods.copies.copy(session, method, copy.name))

    return await creation.answer(create, headers=_created_headers)


@router.post(
    "/methods/{method}:restore",
    responses=problem_responses(MethodNotFound, MethodVersionNotFound, FileInTheWay, PresetReadOnly, InvalidRequest),
)
async def restore_method(
    method: MethodRef,
    session: WriteSession,
    services: ServicesDep,
    response: Response,
    version: Annotated[
        int | None,
        Query(ge=1, le=2**31 - 1, description="The version to go back to; by default the newest.", examples=[1]),
    ] = None,
) -> MethodRead:
    """Bring a version of the method and its files back; what was edited on disk becomes a version before."""
    restored = await services.methods.restoring.restore(session, method, version)
    return await tagged_method(services, restored, response)


@router.post(
    "/methods/{method}:reset",
    responses=problem_responses(MethodNotFound, PresetNotFound, NotATemplate, FileInTheWay, InvalidRequest),
)
async def reset_method(
    method: MethodRef, session: WriteSession, services: ServicesDep, response: Response
) -> MethodRead:
    """Put a shipped template and its files back to what was shipped; what was adapted stays among its versions."""
    return await tagged_method(services, await services.methods.restoring.reset(session, method), response)


@router.get("/methods/{method}/versions", responses=problem_responses(MethodNotFound, InvalidCursor))
async def list_method_versions(
    method: MethodRef, session: ReadSession, services: ServicesDep, paging: VersionPaging
) -> Page[MethodVersionSummary]:
    """List the versions of a method; of a deleted one too, by its id."""
    versions, following = await services.methods.registry.versions(session, method, paging)
    return paging.page([method_version_summary(version) for version in versions], following)


@router.get("/methods/{method}/versions/{number}", responses=problem_responses(MethodNotFound, MethodVersionNotFound))
async def get_method_version(
    method: MethodRef,
    number: Annotated[int, Path(ge=1, le=2**31 - 1)],
    session: ReadSession,
    services: ServicesDep,
) -> MethodVersionRead:
    """Read one version of a method; of a deleted one too, by its id."""
    version = await services.methods.registry.version(session, method, number)
    return method_version_read(version, await services.methods.stage_files.trees(version))


@router.get("/methods/{method}/readiness", responses=problem_responses(MethodNotFound))
async def get_method_readiness(
    method: MethodRef, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> ReadinessRead:
    """Say whether the stages of the method could run now, node by node, and what to do where they could not."""
    return readiness_read(await services.methods.guide.readiness(session, method), language)


@router.get("/readiness", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_readiness(
    session: ReadSession, services: ServicesDep, paging: Paging, language: RequestLanguage
) -> Page[MethodReadinessRead]:
    """Return the readiness matrix: every method, stage and node."""
    methods, following = await services.methods.registry.page(session, MethodFilter(), paging)
    found = await services.methods.guide.readiness_of(session, methods)
    rows = [method_readiness_read(method, one, language) for method, one in zip(methods, found, strict=True)]
    return paging.page(rows, following)


@router.get("/methods/{method}/parameters", responses=problem_responses(MethodNotFound))
async def get_method_parameters(
    method: MethodRef, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> MethodParameters:
    """Return what can be set at every stage, as JSON Schema, read from the scripts without running them."""
    found = await services.methods.registry.get(session, method)
    stages = await services.methods.guide.parameters(session, found, language)
    return parameters_read(found, stages, await services.methods.presets.origin(session, found), language)


@router.get(
    "/methods/{method}/command",
    responses=problem_responses(MethodNotFound, ModelNotFound, InvalidRequest, InsufficientDiskSpace),
)
async def get_stage_command(
    method: MethodRef,
    services: ServicesDep,
    language: RequestLanguage,
    stage: Annotated[str, Query(description="Stage of the method.", examples=["training"])] = JobKind.TRAINING,
    base_model: Annotated[str | None, Query(description="Id or name.", examples=["tiny-base"])] = None,
    dataset: Annotated[str | None, Query(description="Id or name.", examples=["sft-demo"])] = None,
    model: Annotated[
        str | None, Query(description="Id or name of the model that a later stage works on, instead of both.")
    ] = None,
    parameters: Annotated[
        str | None, Query(description="The job's parameters, a JSON object.", examples=['{"max_steps": 10}'])
    ] = None,
    accelerators: Annotated[int | None, Query(ge=0, le=1024, description="How many the job asks for.")] = None,
) -> StageCommandRead:
    """Show exactly what a job would run: command, variables, files and working directory, made as for its launch.

    Nothing runs. What a submit would refuse is refused, save that no node can run it now.
    """
    wanted = WantedCommand(method, stage, base_model, dataset, model, parameters, accelerators)
    return stage_command_read(await services.stage_commands.show(wanted), language)


@router.post(
    "/methods/{method}:preview",
    responses=problem_responses(
        MethodNotFound,
        InvalidRequest,
        InvalidDataset,
        DatasetMissing,
        *PREVIEW_ERRORS,
    ),
)
@needs(Permission.RUN)
async def preview_rows(
    method: MethodRef, wanted: RowsPreview, request: Request, services: ServicesDep, language: RequestLanguage
) -> PreviewRead:
    """Show what a training with the method would be given and would learn of single rows, token by token.

    The training's own code writes them with the base model's chat template, in the method's environment; it must be
    built. A row that a training would refuse is shown with the reason. `lengths` counts the tokens of all rows, of a
    sample of a large data set. Nothing is trained.
    """
    return preview_read(await preview_answer(request, services, wanted.request(method)), language)


async def tagged_method(services: ServicesDep, method: Method, response: Response) -> MethodRead:
    """Return the method as it is read, and put its `ETag` on the response."""
    response.headers["ETag"] = etag_of(method.tag)
    return await _read(services, method)


async def _read(services: ServicesDep, method: Method) -> MethodRead:
    return method_read(method, await services.methods.stage_files.states(method))


def _created_headers(body: Mapping[str, Any]) -> Mapping[str, str]:
    return {
        "Location": f"/api/v1/methods/{body['id']}",
        "ETag": etag_of(version_tag(body["id"], body["version"])),
    }
