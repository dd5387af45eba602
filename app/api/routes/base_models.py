"""Base models: folders under `models/` that trainings start from."""

import asyncio
import re
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.answers import ordered
from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession, after_commit
from app.api.downloads import (
    ARCHIVE_RESPONSES,
    FILE_RESPONSES,
    ByteRange,
    FileDownload,
    ModelFilePath,
    archive_answer,
    file_answer,
    upload_headers,
)
from app.api.errors import BadRequest, RangeNotSatisfiable, problem_responses
from app.api.guards import RawUpload
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router, needs
from app.api.schemas.base_models import (
    BaseModelCreate,
    BaseModelDownload,
    BaseModelFileList,
    BaseModelFileRead,
    BaseModelLoading,
    BaseModelRead,
    UnregisteredBaseModels,
    base_model_file,
    base_model_files,
    base_model_read,
)
from app.api.schemas.jobs import JobRead
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.domain.plain_text import shown
from app.executor.jobs.base_model_builds import BaseModelThere
from app.registry.base_models.card import BaseModelUnreadable, NotABaseModel
from app.registry.base_models.service import BaseModelFilesNeeded, BaseModelInUse
from app.registry.base_models.uploads import (
    NothingUploaded,
    Part,
    UploadBusy,
    UploadOffsetWrong,
    UploadPartWrong,
    UploadTooLarge,
    UploadUnfinished,
)
from app.registry.models.folders import ModelFileNotFound
from app.registry.resource_paths import InvalidPath, PathNotFound, PathOutsideFolder
from app.store.base_models import BaseModelNotFound
from app.store.methods import NameTaken

router = Router(changes=Permission.RUN, prefix="/api/v1", tags=["base models"])

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", default="name"))]
_RAW_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": "{}"}},
    }
}
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


class ContentRangeUnreadable(BadRequest):
    """`Content-Range` is not of the form `bytes FIRST-LAST/TOTAL`."""

    code = "content_range_unreadable"


def base_model_uploads(max_bytes: int) -> list[RawUpload]:
    """Return the addresses here that take raw bodies."""
    return [RawUpload("PUT", re.compile(r"/api/v1/base-models/[^/]+/(files/.+|archive)"), max_bytes)]


async def _upload_part(
    content_range: Annotated[
        str | None,
        Header(
            alias="Content-Range",
            description="`bytes FIRST-LAST/TOTAL`: the body is a part of the file.",
            examples=["bytes 1048576-2097151/3087467144"],
        ),
    ] = None,
    content_length: Annotated[int | None, Header(alias="Content-Length", include_in_schema=False)] = None,
) -> Part:
    if content_range is None:
        return Part(start=0, total=content_length)
    found = _CONTENT_RANGE.fullmatch(content_range.strip())
    if found is None or not int(found[1]) <= int(found[2]) < int(found[3]):
        raise ContentRangeUnreadable(given=shown(content_range))
    return Part(start=int(found[1]), total=int(found[3]))


UploadPart = Annotated[Part, Depends(_upload_part)]
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
        NothingUploaded,
        UploadUnfinished,
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
    """Register a folder under `models/`, or what was uploaded under the name; its card is read from its files."""
    service = services.base_models
    plan = await service.plan(name=base_model.name, path=base_model.path)

    async def create() -> BaseModelRead:
        row = await service.create(session, plan, description=base_model.description)
        return base_model_read(row, language)

    return await creation.answer(create, headers=lambda body: {"Location": f"/api/v1/base-models/{body['id']}"})


@router.get("/base-models:unregistered")
async def list_unregistered_base_models(session: ReadSession, services: ServicesDep) -> UnregisteredBaseModels:
    """List folders under `models/` that look like models and have no entry yet."""
    return UnregisteredBaseModels(items=await services.base_models.unregistered(session))


@router.post(
    "/base-models:download",
    status_code=201,
    responses={
        200: {"model": JobRead, "description": "It is being downloaded already: that job."},
        **problem_responses(InvalidRequest, NameTaken, BaseModelThere),
    },
)
async def download_base_model(
    wanted: BaseModelDownload,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
    response: Response,
) -> JobRead:
    """Register a model of a hub and order the job that downloads it, on a node, with its progress as events.

    The hub is the one of `HF_ENDPOINT` of the worker. Sizes and digests are compared; what broke off is continued when
    the same is ordered again, or by the next submit that needs the model.
    """
    details, is_new = await services.job_actions.download_base_model(session, **wanted.model_dump())
    return ordered(details, session, services, language, response, is_new=is_new)


@router.get("/base-models/{base_model}", responses=problem_responses(BaseModelNotFound))
async def get_base_model(
    base_model: BaseModelRef, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> BaseModelRead:
    """Read a base model."""
    return base_model_read(await services.base_models.get(session, base_model), language)


@router.post("/base-models/{base_model}:allow-loading", responses=problem_responses(BaseModelNotFound))
@needs(Permission.DEVELOP)
async def allow_base_model_loading(
    base_model: BaseModelRef,
    wanted: BaseModelLoading,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
    language: RequestLanguage,
) -> BaseModelRead:
    """Allow what runs code of the model's author when it is loaded; what is not given is forbidden (again).

    The platform's scripts load nothing but safetensors and classes of their libraries unless it is allowed here.
    Scripts of users load what they want.
    """
    row = await services.base_models.allow_loading(session, base_model, by=caller.name, **wanted.model_dump())
    return base_model_read(row, language)


@router.delete(
    "/base-models/{base_model}",
    status_code=204,
    responses=problem_responses(BaseModelNotFound, BaseModelInUse, BaseModelFilesNeeded),
)
async def delete_base_model(
    base_model: BaseModelRef,
    session: WriteSession,
    services: ServicesDep,
    with_files: Annotated[bool, Query(description="Remove the folder as well.")] = False,
) -> None:
    """Delete the entry; the folder stays unless `with_files` is given."""
    after_commit(session, await services.base_models.delete(session, base_model, with_files=with_files))


# ---- files ----------------------------------------------------------------------------------------------------------


@router.get("/base-models/{base_model}/files", responses=problem_responses(BaseModelNotFound))
async def list_base_model_files(
    base_model: BaseModelRef, session: ReadSession, services: ServicesDep
) -> BaseModelFileList:
    """List the files of a base model, or what is uploaded of one that is not registered yet."""
    return base_model_files(await services.base_models.files_or_upload(session, base_model))


@router.get(
    "/base-models/{base_model}/files/{path:path}",
    response_class=FileDownload,
    responses={**FILE_RESPONSES, **problem_responses(ModelFileNotFound, RangeNotSatisfiable)},
)
async def get_base_model_file(
    base_model: BaseModelRef,
    path: ModelFilePath,
    session: ReadSession,
    services: ServicesDep,
    wanted: ByteRange = None,
) -> FileDownload:
    """Read a file of a base model, or the part of it that `Range` names.

    Of a file that is being uploaded, `Upload-Offset` says how many bytes are there (a HEAD is enough), and
    `Upload-Complete: ?0` that more are to come.
    """
    file = await services.base_models.file_or_upload(session, base_model, path)
    return await file_answer(file.place, path, wanted, **upload_headers(file))


@router.put(
    "/base-models/{base_model}/files/{path:path}",
    openapi_extra=_RAW_BODY,
    responses=problem_responses(
        ContentRangeUnreadable,
        InvalidRequest,
        NameTaken,
        InvalidPath,
        PathOutsideFolder,
        UploadOffsetWrong,
        UploadBusy,
        UploadTooLarge,
        UploadPartWrong,
    ),
)
async def upload_base_model_file(
    base_model: Annotated[str, Path(description="Technical name of the new base model.", examples=["Qwen2.5-1.5B"])],
    path: ModelFilePath,
    part: UploadPart,
    request: Request,
    services: ServicesDep,
    response: Response,
) -> BaseModelFileRead:
    """Upload a file of a base model that is not registered yet (`curl -T config.json .../files/config.json`).

    With `Content-Range: bytes FIRST-LAST/TOTAL` the body is a part of it, and FIRST is where the bytes that are there
    end. When all files are there, `POST /base-models` with the name and without a path checks and registers them.
    """
    async with services.database.reading() as session:  # closed before gigabytes come
        await services.base_models.require_unregistered(session, base_model)
    file = await services.base_models.uploads.receive(base_model, path, request.stream(), part)
    response.headers.update(upload_headers(file))
    return base_model_file(file)


@router.put(
    "/base-models/{base_model}/archive",
    openapi_extra=_RAW_BODY,
    responses=problem_responses(
        ContentRangeUnreadable,
        InvalidRequest,
        NameTaken,
        UploadOffsetWrong,
        UploadBusy,
        UploadTooLarge,
        UploadPartWrong,
    ),
)
async def upload_base_model_archive(
    base_model: Annotated[str, Path(description="Technical name of the new base model.", examples=["Qwen2.5-1.5B"])],
    part: UploadPart,
    request: Request,
    services: ServicesDep,
    response: Response,
) -> BaseModelFileRead:
    """Upload the files of a base model in one archive: .tar, .tar.gz or .zip, the files in one folder or in none.

    It takes parts as files do; `archive_offset` of the list of files says how many bytes are there. Once it is whole,
    its files take the place of what was uploaded before; links and names that leave the folder are refused.
    """
    async with services.database.reading() as session:
        await services.base_models.require_unregistered(session, base_model)
    archive = await services.base_models.uploads.receive_archive(base_model, request.stream(), part)
    response.headers.update(upload_headers(archive))
    return base_model_file(archive)


@router.delete("/base-models/{base_model}/files", status_code=204, responses=problem_responses(NameTaken))
async def discard_base_model_upload(base_model: BaseModelRef, session: ReadSession, services: ServicesDep) -> None:
    """Remove what was uploaded under the name and is not registered."""
    await services.base_models.require_unregistered(session, base_model)
    await asyncio.to_thread(services.base_models.uploads.discard, base_model)


@router.get(
    "/base-models/{base_model}/archive",
    response_class=StreamingResponse,
    responses={**ARCHIVE_RESPONSES, **problem_responses(BaseModelNotFound, ModelFileNotFound)},
)
async def get_base_model_archive(
    base_model: BaseModelRef, session: ReadSession, services: ServicesDep
) -> StreamingResponse:
    """Read all files of a base model as one tar; its size is known beforehand."""
    row = await services.base_models.get(session, base_model)
    return archive_answer(await services.base_models.archive(row), row.name)
