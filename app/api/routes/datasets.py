"""Data sets: register, upload, check, preview, delete."""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Request, Response

from app.api.dependencies import ReadSession, ServicesDep, WriteSession, after_commit
from app.api.errors import UnsupportedMediaType, problem_responses
from app.api.guards import RawUpload
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router
from app.api.schemas.resources import (
    DatasetCheck,
    DatasetCreate,
    DatasetPreview,
    DatasetRead,
    DatasetValidation,
    dataset_preview,
    dataset_read,
    dataset_validation,
)
from app.domain.errors import InvalidRequest
from app.registry.dataset_files import (
    DatasetChanging,
    DatasetFileExists,
    DatasetUnreadable,
    NotADataset,
    SeveralDatasets,
)
from app.registry.datasets import (
    DatasetFileShared,
    DatasetInUse,
    DatasetIsFolder,
    DatasetMissing,
    InvalidDataset,
)
from app.registry.resource_paths import InvalidPath, PathNotFound, PathOutsideFolder
from app.store.datasets import DatasetNotFound
from app.store.methods import NameTaken

router = Router(prefix="/api/v1", tags=["data sets"])

MAX_PREVIEW: Final = 200
_MEDIA_TYPES: Final = ("application/jsonl", "application/x-ndjson", "application/octet-stream")
# curl sends none with -T; form types are refused, because `curl -d` has removed the line ends by then
_ACCEPTED: Final = frozenset({*_MEDIA_TYPES, "", "application/x-jsonlines", "application/jsonlines", "text/plain"})
_RAW_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            media_type: {
                "schema": {"type": "string", "format": "binary"},
                "example": '{"prompt": "Who are you?", "completion": "A test."}\n',
            }
            for media_type in _MEDIA_TYPES
        },
    }
}
_FILE_ERRORS: Final = (NotADataset, SeveralDatasets, DatasetUnreadable, DatasetChanging, InvalidDataset)
_PATH_ERRORS: Final = (PathOutsideFolder, InvalidPath, PathNotFound)

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", "rows", "size_bytes", default="name"))]
DatasetRef = Annotated[str, Path(description="Id or name of the data set.", examples=["faq"])]
"""`{dataset}` in the addresses."""


def dataset_uploads(max_upload_bytes: int) -> list[RawUpload]:
    """Return the addresses here that take raw bodies."""
    return [RawUpload("PUT", re.compile(r"/api/v1/datasets/[^/]+/file"), max_upload_bytes)]


def _jsonl_body(request: Request) -> AsyncIterator[bytes]:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() not in _ACCEPTED:
        raise UnsupportedMediaType(given=given, expected=", ".join(_MEDIA_TYPES))
    return request.stream()


@router.get("/datasets", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_datasets(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    q: TextInName = None,
) -> Page[DatasetRead]:
    """List the data sets."""
    found = await services.datasets.page(session, paging, text=q)
    return paging.page([dataset_read(row) for row in found.rows], found.next_position)


@router.post(
    "/datasets",
    status_code=201,
    response_model=DatasetRead,
    responses=problem_responses(InvalidRequest, NameTaken, *_PATH_ERRORS, *_FILE_ERRORS, IdempotencyKeyReused),
)
async def create_dataset(
    dataset: DatasetCreate, session: WriteSession, services: ServicesDep, creation: CreationDep
) -> Response:
    """Register a file or folder under `datasets/`. Every line is checked; each problem comes with its line."""
    service = services.datasets
    prepared = await service.prepare(name=dataset.name, path=dataset.path)

    async def create() -> DatasetRead:
        return dataset_read(await service.create(session, prepared, description=dataset.description))

    return await creation.answer(create, headers=lambda body: {"Location": f"/api/v1/datasets/{body['id']}"})


@router.post("/datasets:validate")
async def validate_dataset(
    dataset: DatasetCheck, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> DatasetValidation:
    """Say everything that registering would say; nothing is changed."""
    validation = await services.datasets.validate(session, name=dataset.name, path=dataset.path)
    return dataset_validation(validation, language)


@router.get("/datasets/{dataset}", responses=problem_responses(DatasetNotFound))
async def get_dataset(dataset: DatasetRef, session: ReadSession, services: ServicesDep) -> DatasetRead:
    """Read a data set."""
    return dataset_read(await services.datasets.get(session, dataset))


@router.get("/datasets/{dataset}/preview", responses=problem_responses(DatasetNotFound, DatasetMissing, *_FILE_ERRORS))
async def preview_dataset(
    dataset: DatasetRef,
    session: ReadSession,
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PREVIEW, description="Most rows.")] = 10,
    offset: Annotated[int, Query(ge=0, le=2**53, description="Rows to leave out.")] = 0,
) -> DatasetPreview:
    """Read some rows, as they stand in the file now."""
    row = await services.datasets.get(session, dataset)
    return dataset_preview(await services.datasets.preview(row, offset=offset, limit=limit))


@router.put(
    "/datasets/{dataset}/file",
    status_code=201,
    openapi_extra=_RAW_BODY,
    responses=problem_responses(
        InvalidRequest, NameTaken, InvalidDataset, DatasetFileExists, DatasetChanging, UnsupportedMediaType
    ),
)
async def upload_dataset(
    dataset: Annotated[str, Path(description="Name of the new data set.", examples=["faq"])],
    body: Annotated[AsyncIterator[bytes], Depends(_jsonl_body)],
    session: WriteSession,
    services: ServicesDep,
    response: Response,
) -> DatasetRead:
    """Upload a JSONL file as a new data set (`curl -T faq.jsonl .../datasets/faq/file`); kept only if it is valid."""
    async with services.database.reading() as early:  # to say at once what would be said after gigabytes
        await services.datasets.check_new_name(early, dataset)
    row = await services.datasets.upload(session, name=dataset, chunks=body)
    response.headers["Location"] = f"/api/v1/datasets/{row.id}"
    return dataset_read(row)


@router.delete(
    "/datasets/{dataset}",
    status_code=204,
    responses=problem_responses(DatasetNotFound, DatasetInUse, DatasetIsFolder, DatasetFileShared),
)
async def delete_dataset(
    dataset: DatasetRef,
    session: WriteSession,
    services: ServicesDep,
    with_file: Annotated[bool, Query(description="Remove the file as well; not for folders.")] = False,
) -> None:
    """Delete the entry; the file stays unless `with_file` is given."""
    after_commit(session, await services.datasets.delete(session, dataset, with_file=with_file))
