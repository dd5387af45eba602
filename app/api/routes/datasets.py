"""Data sets: register, upload, check, preview, delete."""

import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse

from app.api.answers import measured_rows
from app.api.dependencies import ReadSession, ServicesDep, WriteSession, after_commit
from app.api.errors import UnsupportedMediaType, problem_responses
from app.api.guards import RawUpload
from app.api.idempotency import CreationDep, IdempotencyKeyReused
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, TextInName, page_params
from app.api.routing import Router, needs
from app.api.schemas.datasets import (
    DatasetCheck,
    DatasetCreate,
    DatasetMixCreate,
    DatasetPreview,
    DatasetProfile,
    DatasetRead,
    DatasetValidation,
    dataset_preview,
    dataset_profile,
    dataset_read,
    dataset_validation,
)
from app.domain.access import Permission
from app.domain.errors import InvalidRequest
from app.executor.jobs.row_previews import PREVIEW_ERRORS
from app.formats.base import MEDIA_TYPES, Format, Options
from app.registry.datasets.files import (
    DatasetChanging,
    DatasetFileExists,
    DatasetUnreadable,
    NotADataset,
    SeveralDatasets,
)
from app.registry.datasets.process import DatasetUnprocessed
from app.registry.datasets.service import (
    DatasetFileShared,
    DatasetInUse,
    DatasetIsFolder,
    DatasetMissing,
    DatasetUnprofiled,
    InvalidDataset,
)
from app.registry.resource_paths import InvalidPath, PathNotFound, PathOutsideFolder
from app.store.datasets import DatasetNotFound
from app.store.methods import MethodNotFound, NameTaken

router = Router(changes=Permission.RUN, prefix="/api/v1", tags=["data sets"])

MAX_PREVIEW: Final = 200
_TABLES: Final = frozenset({"text/csv", "text/tab-separated-values"})
_TEXT_EXAMPLES: Final = {
    "application/jsonl": '{"prompt": "Who are you?", "completion": "A test."}\n',
    "text/csv": "prompt,completion\nWho are you?,A test.\n",
    "text/tab-separated-values": "prompt\tcompletion\nWho are you?\tA test.\n",
}
# JSON is accepted but not documented: generated clients would encode the file as a JSON text
_MEDIA_TYPES: Final = (
    *_TEXT_EXAMPLES,
    *(MEDIA_TYPES[kind] for kind in (Format.XLSX, Format.PARQUET, Format.ARROW)),
    *("application/gzip", "application/zip", "application/x-tar", "application/x-ndjson", "application/octet-stream"),
)
# curl sends none with -T; form types are refused, because `curl -d` has removed the line ends by then
_ACCEPTED: Final = frozenset(
    {
        *_MEDIA_TYPES,
        *(
            "",
            "application/json",
            "application/x-jsonlines",
            "application/jsonlines",
            "text/plain",
            "application/x-gzip",
        ),
        *("application/vnd.ms-excel", "application/x-zip-compressed", "application/parquet"),
    }
)
_RAW_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            media_type: {
                "schema": {"type": "string", "format": "binary"},
                "example": _TEXT_EXAMPLES.get(media_type, "(the bytes of the file)"),
            }
            for media_type in _MEDIA_TYPES
        },
    }
}
_FILE_ERRORS: Final = (
    NotADataset,
    SeveralDatasets,
    DatasetUnreadable,
    DatasetChanging,
    InvalidDataset,
    DatasetUnprocessed,
)
# one type for all: what generated clients hand on as bytes; `source` of a data set says what it is
_BYTES: Final = "application/octet-stream"
_CONTENT: Final = {_BYTES: {"schema": {"type": "string", "format": "binary"}}}
_DOWNLOAD: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": _CONTENT, "description": "The file."},
    206: {"content": _CONTENT, "description": "The part that `Range` asked for."},
}
_PATH_ERRORS: Final = (PathOutsideFolder, InvalidPath, PathNotFound)

Paging = Annotated[PageParams, Depends(page_params("name", "created_at", "rows", "size_bytes", default="name"))]
DatasetRef = Annotated[str, Path(description="Id or name of the data set.", examples=["faq"])]
"""`{dataset}` in the addresses."""


def dataset_uploads(max_upload_bytes: int) -> list[RawUpload]:
    """Return the addresses here that take raw bodies."""
    return [RawUpload("PUT", re.compile(r"/api/v1/datasets/[^/]+/file"), max_upload_bytes)]


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _file_body(request: Request) -> AsyncIterator[bytes]:
    if _media_type(request) not in _ACCEPTED:
        given = request.headers.get("content-type", "")
        raise UnsupportedMediaType(given=given, expected=", ".join(_MEDIA_TYPES))
    return request.stream()


def _options(
    request: Request,
    encoding: Annotated[
        str | None, Query(description="Encoding of a text that is not UTF-8.", examples=["gb18030"])
    ] = None,
    delimiter: Annotated[
        str | None, Query(description="What stands between the fields of a table: comma, semicolon, tab or pipe.")
    ] = None,
    sheet: Annotated[str | None, Query(description="Sheet of a workbook.", examples=["Sheet1"])] = None,
) -> Options:
    """Return how an upload is to be read; what is not said is found by its content."""
    return Options(encoding, delimiter, sheet, table=_media_type(request) in _TABLES)


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
    """Register a file or folder under `datasets/`. Every row is checked; each problem comes with its line.

    A file of another format than JSONL is converted to a hidden file beside it.
    """
    service = services.datasets
    prepared = await service.prepare(name=dataset.name, path=dataset.path, options=dataset.options())

    async def create() -> DatasetRead:
        return dataset_read(await service.create(session, prepared, description=dataset.description))

    return await creation.answer(create, headers=_location)


@router.post("/datasets:validate")
@needs(Permission.READ)
async def validate_dataset(
    dataset: DatasetCheck, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> DatasetValidation:
    """Say everything that registering would say; nothing is changed."""
    validation = await services.datasets.validate(
        session, name=dataset.name, path=dataset.path, options=dataset.options()
    )
    return dataset_validation(validation, language)


@router.post(
    "/datasets:mix",
    status_code=201,
    response_model=DatasetRead,
    responses=problem_responses(
        InvalidRequest,
        NameTaken,
        InvalidDataset,
        DatasetFileExists,
        DatasetChanging,
        DatasetUnprocessed,
        IdempotencyKeyReused,
    ),
)
async def mix_datasets(
    mix: DatasetMixCreate, session: WriteSession, services: ServicesDep, creation: CreationDep
) -> Response:
    """Make a data set out of others: rows with their own fields, as often as wanted, in an order that the seed decides.

    The parts stay as they are. `source.mix` of the new data set keeps the recipe and how many rows were taken of each.
    """
    mixes = services.dataset_mixes
    async with mixes.mixed(mix.name, mix.parts, seed=mix.seed, description=mix.description) as made:

        async def create() -> DatasetRead:
            return dataset_read(await mixes.place(session, made))

        return await creation.answer(create, headers=_location)


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


@router.get(
    "/datasets/{dataset}/profile",
    responses=problem_responses(
        DatasetNotFound,
        DatasetMissing,
        DatasetUnprofiled,
        DatasetUnprocessed,
        MethodNotFound,
        InvalidRequest,
        *PREVIEW_ERRORS,
    ),
)
async def profile_dataset(
    dataset: DatasetRef,
    request: Request,
    services: ServicesDep,
    language: RequestLanguage,
    method: Annotated[
        str | None, Query(description="Id or name: its environment has the tokenizer.", examples=["SFT-Demo"])
    ] = None,
    base_model: Annotated[
        str | None, Query(description="Id or name: count tokens with its tokenizer.", examples=["tiny-base"])
    ] = None,
) -> DatasetProfile:
    """Say how the rows are written, how long they are, what stands twice and what would be left out.

    The whole file is read, by another process. With `method` and `base_model` (both or neither) tokens are counted as a
    training counts them, in the method's environment, of a sample of a large file. Both answers are remembered while
    the file stays as it is.
    """
    async with services.database.reading() as session:
        row = await services.datasets.get(session, dataset)
    measured = await measured_rows(request, services, row.id, method, base_model)
    return dataset_profile(await services.datasets.profile(row), measured, language)


@router.get(
    "/datasets/{dataset}/file",
    response_class=FileResponse,
    responses={
        **_DOWNLOAD,
        **problem_responses(DatasetNotFound, DatasetMissing, *_FILE_ERRORS),
    },
)
async def download_dataset(dataset: DatasetRef, session: ReadSession, services: ServicesDep) -> FileResponse:
    """Download the rows as scripts read them: JSONL. `Range` is honoured."""
    row = await services.datasets.get(session, dataset)
    file = await services.datasets.rows_file(row)
    return FileResponse(file, media_type=_BYTES, filename=f"{row.name}.jsonl")


@router.get(
    "/datasets/{dataset}/original",
    response_class=FileResponse,
    responses={
        **_DOWNLOAD,
        **problem_responses(DatasetNotFound, DatasetMissing, NotADataset, SeveralDatasets),
    },
)
async def download_original(dataset: DatasetRef, session: ReadSession, services: ServicesDep) -> FileResponse:
    """Download the file as it was brought; of a folder, the one with the rows. `Range` is honoured."""
    row = await services.datasets.get(session, dataset)
    file = await services.datasets.original_file(row)
    return FileResponse(file, media_type=_BYTES, filename=file.name)


@router.put(
    "/datasets/{dataset}/file",
    status_code=201,
    openapi_extra=_RAW_BODY,
    responses=problem_responses(
        InvalidRequest,
        NameTaken,
        InvalidDataset,
        DatasetFileExists,
        DatasetChanging,
        DatasetUnprocessed,
        UnsupportedMediaType,
    ),
)
async def upload_dataset(
    dataset: Annotated[str, Path(description="Name of the new data set.", examples=["faq"])],
    body: Annotated[AsyncIterator[bytes], Depends(_file_body)],
    options: Annotated[Options, Depends(_options)],
    session: WriteSession,
    services: ServicesDep,
    response: Response,
) -> DatasetRead:
    """Upload a file as a new data set (`curl -T faq.csv .../datasets/faq/file`); kept only if it is valid.

    JSONL, JSON arrays, CSV, Excel (.xlsx), Parquet and Arrow are recognized by their content, also in a .gz or .zip.
    Scripts read JSONL: any other file is converted once, and the original is kept. A .zip or .tar.gz with one such file
    and pictures becomes a folder.
    """
    async with services.database.reading() as early:  # to say at once what would be said after gigabytes
        await services.datasets.check_new_name(early, dataset)
    row = await services.datasets.upload(session, name=dataset, chunks=body, options=options)
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
    with_file: Annotated[
        bool, Query(description="Remove the file as well; of folders, only those that were uploaded as an archive.")
    ] = False,
) -> None:
    """Delete the entry and the rows that were converted; the file stays unless `with_file` is given."""
    after_commit(session, await services.datasets.delete(session, dataset, with_file=with_file))


def _location(body: Mapping[str, Any]) -> Mapping[str, str]:
    return {"Location": f"/api/v1/datasets/{body['id']}"}
