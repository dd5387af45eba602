"""Python files: those of a method's stages, and all of the script root. Bodies are the bytes themselves."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Path, Query, Request, Response

from app.api.conditional import IfMatch, StaleVersion, etag_of, parse_if_match
from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import PreconditionRequired, UnsupportedMediaType, problem_responses
from app.api.guards import RawUpload
from app.api.headers import IF_MATCH, IF_NONE_MATCH
from app.api.language import RequestLanguage
from app.api.list_response import page_by_name
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routes.methods import MethodRef, tagged_method
from app.api.routing import Router, needs
from app.api.schemas.common import StageName
from app.api.schemas.method_files import (
    MethodFileList,
    ScriptRead,
    ScriptSummary,
    method_files,
    script_read,
    script_summary,
)
from app.api.schemas.method_suggestions import SuggestionRead, SuggestionRequest, suggestion_read
from app.api.schemas.methods import MethodRead
from app.domain.access import Permission
from app.domain.errors import InvalidRequest, PreconditionFailed
from app.registry.methods.restoring import FileInTheWay
from app.registry.methods.service import MethodMoved, PresetReadOnly
from app.registry.methods.stage_files import ScriptContent, ScriptInUse, ScriptNotFound, StageWithoutFile
from app.registry.methods.suggesting import NothingToSuggest
from app.registry.scripts.names import SUFFIX, FileOutsideRoot, FilePathTooLong, InvalidFilePath
from app.registry.scripts.root import ScriptTooLarge
from app.store.methods import MethodNotFound, MethodVersionNotFound

router = Router(changes=Permission.DEVELOP, prefix="/api/v1", tags=["scripts"])

PYTHON_MEDIA_TYPE: Final = "text/x-python"
_ACCEPTED = re.compile(r"(text/(x-python|plain|x-script\.python)|application/(octet-stream|x-python(-code)?))?", re.I)
_FORM = re.compile(r"multipart/|application/x-www-form-urlencoded", re.I)
_RAW_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}, "example": "print('hello')\n"}
            for media_type in (PYTHON_MEDIA_TYPE, "application/octet-stream")
        },
    }
}
_RAW_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The file.", "content": {PYTHON_MEDIA_TYPE: {"schema": {"type": "string"}}}},
}
_NEW: Final[dict[int | str, dict[str, Any]]] = {201: {"description": "The file is new.", "model": ScriptRead}}
_BAD_PATH: Final = (FileOutsideRoot, InvalidFilePath, FilePathTooLong)
ScriptPath = Annotated[str, Path(description="Path in the script root.", examples=["finance_sft.py"])]


class ScriptExists(PreconditionFailed):
    """`If-None-Match: *` on a file that is there."""

    code = "script_exists"


def script_uploads(max_script_bytes: int) -> list[RawUpload]:
    """Return the addresses here that take raw bodies."""
    patterns = (r"/api/v1/methods/[^/]+/files/[^/]+", r"/api/v1/scripts/.+")
    return [RawUpload("PUT", re.compile(pattern), max_script_bytes) for pattern in patterns]


async def _python_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if not _ACCEPTED.fullmatch(kind):
        raise UnsupportedMediaType(given=kind, expected=f"{PYTHON_MEDIA_TYPE}, application/octet-stream")
    return await request.body()


async def _file_body(request: Request, path: ScriptPath) -> bytes:
    if path.endswith(SUFFIX) or "." not in path.rpartition("/")[2]:
        return await _python_body(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if _FORM.match(kind):
        raise UnsupportedMediaType(given=kind, expected="application/octet-stream")
    return await request.body()


async def _script_precondition(
    path: ScriptPath,
    if_match: Annotated[str | None, Header(alias=IF_MATCH, description="`ETag` of the file that is replaced.")] = None,
    if_none_match: Annotated[
        str | None, Header(alias=IF_NONE_MATCH, description="`*`: only if no file is there.")
    ] = None,
) -> Callable[[str | None], None]:
    """Return what demands, of the sha256 that is there, that nothing is overwritten unread."""

    def require(current: str | None) -> None:
        if current is None:
            if if_match is not None:
                parse_if_match(if_match).require("-")
        elif if_none_match is not None:
            raise ScriptExists(file=path)
        else:
            parse_if_match(if_match).require(current)

    return require


Paging = Annotated[PageParams, Depends(page_params("path", default="path"))]
PythonBody = Annotated[bytes, Depends(_python_body)]
FileBody = Annotated[bytes, Depends(_file_body)]
ScriptPrecondition = Annotated[Callable[[str | None], None], Depends(_script_precondition)]


@router.get("/methods/{method}/files", responses=problem_responses(MethodNotFound))
async def list_method_files(method: MethodRef, session: ReadSession, services: ServicesDep) -> MethodFileList:
    """List the files of a method and how they stand on disk."""
    found = await services.methods.registry.get(session, method)
    return MethodFileList(items=method_files(await services.methods.stage_files.states(found)))


@router.get(
    "/methods/{method}/files/{stage}",
    response_class=Response,
    responses={**_RAW_ANSWER, **problem_responses(MethodNotFound, StageWithoutFile)},
)
async def get_method_file(method: MethodRef, stage: StageName, session: ReadSession, services: ServicesDep) -> Response:
    """Read the file of a stage as it stands on disk; the stored bytes if it is gone from there."""
    return _raw(await services.methods.stage_files.read(session, method, stage))


@router.get(
    "/methods/{method}/versions/{number}/files/{stage}",
    response_class=Response,
    responses={
        **_RAW_ANSWER,
        **problem_responses(MethodNotFound, MethodVersionNotFound, StageWithoutFile, ScriptNotFound),
    },
)
async def get_method_version_file(
    method: MethodRef,
    number: Annotated[int, Path(ge=1, le=2**31 - 1, description="Number of the version.", examples=[1])],
    stage: StageName,
    session: ReadSession,
    services: ServicesDep,
    path: Annotated[
        str | None, Query(description="A file that runs beside the stage's own; by default that one.")
    ] = None,
) -> Response:
    """Read the bytes that a version of the method runs at a stage; of a deleted method too, by its id."""
    return _raw(await services.methods.stage_files.read_version(session, method, number, stage, path))


@router.put(
    "/methods/{method}/files/{stage}",
    openapi_extra=_RAW_BODY,
    responses=problem_responses(
        MethodNotFound,
        StageWithoutFile,
        PreconditionRequired,
        StaleVersion,
        MethodMoved,
        PresetReadOnly,
        FileInTheWay,
        ScriptTooLarge,
        InvalidRequest,
        UnsupportedMediaType,
    ),
)
async def replace_method_file(
    method: MethodRef,
    stage: StageName,
    content: PythonBody,
    if_match: IfMatch,
    session: WriteSession,
    services: ServicesDep,
    response: Response,
) -> MethodRead:
    """Replace the file of a stage; makes a new version. `If-Match` is the `ETag` of the file."""
    changed = await services.methods.stage_files.write(session, method, stage, content, precondition=if_match.require)
    return await tagged_method(services, changed, response)


@router.get("/scripts", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_scripts(
    services: ServicesDep,
    paging: Paging,
    every_type: Annotated[bool, Query(description="List files of other types too.")] = False,
) -> Page[ScriptSummary]:
    """List all Python files of the script root."""
    entries = await services.methods.stage_files.entries(every_type=every_type)
    return page_by_name(map(script_summary, entries), paging, name=lambda script: script.path)


@router.get(
    "/scripts/{path:path}",
    response_class=Response,
    responses={**_RAW_ANSWER, **problem_responses(ScriptNotFound, *_BAD_PATH)},
)
async def get_script(path: ScriptPath, services: ServicesDep) -> Response:
    """Read a file of the script root."""
    return _raw(await services.methods.stage_files.read_script(path))


@router.put(
    "/scripts/{path:path}",
    openapi_extra=_RAW_BODY,
    responses={
        **_NEW,
        **problem_responses(
            PreconditionRequired,
            StaleVersion,
            ScriptExists,
            ScriptTooLarge,
            InvalidRequest,
            UnsupportedMediaType,
            *_BAD_PATH,
        ),
    },
)
async def write_script(
    path: ScriptPath,
    content: FileBody,
    precondition: ScriptPrecondition,
    session: WriteSession,
    services: ServicesDep,
    response: Response,
) -> ScriptRead:
    """Upload a file to the script root. To replace one, `If-Match` names the bytes that were read.

    A file of any type keeps its name; a name without suffix means a Python file.
    A name that would hide a module from the scripts of the folder, such as `json.py`, is refused.
    """
    written, new = await services.methods.stage_files.write_script(session, path, content, precondition=precondition)
    response.status_code = 201 if new else 200
    response.headers["ETag"] = etag_of(written.sha256)
    return script_read(written)


@router.delete(
    "/scripts/{path:path}",
    status_code=204,
    responses=problem_responses(ScriptNotFound, PreconditionRequired, StaleVersion, ScriptInUse, *_BAD_PATH),
)
async def delete_script(path: ScriptPath, session: WriteSession, services: ServicesDep, if_match: IfMatch) -> None:
    """Delete a file of the script root that no method runs or imports. `If-Match` is the `ETag` of the file."""
    await services.methods.stage_files.delete_script(session, path, precondition=if_match.require)


@router.post(
    "/scripts/{name:path}:suggest",
    responses=problem_responses(NothingToSuggest, InvalidRequest, *_BAD_PATH),
)
@needs(Permission.READ)
async def suggest_stage(
    name: Annotated[str, Path(description="A file of the script root, a module, or what starts it in a shell.")],
    wanted: SuggestionRequest,
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
) -> SuggestionRead:
    """Propose how a script, a module or a known program could be called at a stage of a method.

    Rests on the names of options, with a reason for each value that was placed. Nothing is registered or run: a person
    confirms it.
    """
    found = await services.methods.suggestions.suggest(
        session, name, source=wanted.source, stage=wanted.stage, environment=wanted.conda_env
    )
    return suggestion_read(found, language)


def _raw(script: ScriptContent) -> Response:
    headers = {"ETag": etag_of(script.file.sha256), "X-Content-Type-Options": "nosniff"}
    is_python = script.file.file.endswith(SUFFIX)
    media_type = f"{PYTHON_MEDIA_TYPE}; charset=utf-8" if is_python else "application/octet-stream"
    return Response(script.content, media_type=media_type, headers=headers)
