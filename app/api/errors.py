"""Errors become RFC 9457 problem documents: the only place that knows HTTP statuses.

Every way to fail ends in `problem_response`: our typed errors by family, FastAPI's and the database's translated first,
anything else as a 500 that says the request id and nothing more.
"""

import errno
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy.exc
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from app.api.fields import violations_of
from app.api.language import language_headers, negotiate
from app.domain.errors import (
    MAX_LISTED,
    AppError,
    Conflict,
    Invalid,
    InvalidRequest,
    NotAllowed,
    NotFound,
    PreconditionFailed,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
    Violation,
)
from app.domain.texts import DEFAULT_LANGUAGE, Language, text
from app.domain.values import Value
from app.observability import request_id

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"


class BadRequest(AppError):
    """The request cannot be read (400)."""

    code = "bad_request"


class RangeNotSatisfiable(AppError):
    """`Range` names no byte of the file (416)."""

    code = "range_not_satisfiable"


class MethodNotAllowed(AppError):
    """The path exists, but not for this HTTP method (405)."""

    code = "method_not_allowed"


class UnsupportedMediaType(AppError):
    """The route does not accept the body's content type (415)."""

    code = "unsupported_media_type"


class PreconditionRequired(AppError):
    """`If-Match` is missing (428)."""

    code = "precondition_required"


class InternalError(AppError):
    """The service failed (500)."""

    code = "internal_error"


class StorageFull(AppError):
    """No space is left on a disk of the service (507)."""

    code = "storage_full"


class RouteNotFound(NotFound):
    """No route has this path."""

    code = "route_not_found"


class DatabaseUnavailable(Unavailable):
    """The database cannot be reached or refuses the connection."""

    code = "database_unavailable"


class DatabaseBusy(Unavailable):
    """A lock or a connection was not available in time."""

    code = "database_busy"


STATUS_BY_FAMILY: Final[Mapping[type[AppError], int]] = {
    BadRequest: 400,
    Unauthenticated: 401,
    NotAllowed: 403,
    NotFound: 404,
    MethodNotAllowed: 405,
    Conflict: 409,
    PreconditionFailed: 412,
    TooLarge: 413,
    UnsupportedMediaType: 415,
    RangeNotSatisfiable: 416,
    Invalid: 422,
    PreconditionRequired: 428,
    TooMany: 429,
    InternalError: 500,
    Unavailable: 503,
    StorageFull: 507,
}

# SQLSTATE: serialization failure, deadlock, lock not available, too many connections, cancelled by a timeout
_BUSY_STATES = frozenset({"40001", "40P01", "55P03", "53300", "57014"})
_FULL_STATES = frozenset({"53100"})
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})


class ProblemEntry(Value):
    """One thing that is wrong with the request."""

    pointer: str = Field(
        description="RFC 6901 pointer into the body; `?name` is a query parameter, `{name}` a path parameter, "
        "`Name:` a header.",
        examples=["/stages/training/file"],
    )
    code: str = Field(description="Stable code of what is wrong.", examples=["field_required"])
    detail: str = Field(description="What to do, in the caller's language.", examples=["This field is required."])


class Problem(Value):
    """Problem document (RFC 9457) of every error."""

    type: str = Field(description="URN of the code.", examples=["urn:deepe:problem:invalid_request"])
    title: str = Field(description="The kind of error, in the caller's language.", examples=["Invalid request"])
    status: int = Field(description="The HTTP status.", examples=[422])
    detail: str = Field(
        description="What is wrong and what to do, in the caller's language.",
        examples=["The request has 1 problem(s); each is listed under errors with where it is and what to do."],
    )
    instance: str = Field(description="Path of the request.", examples=["/api/v1/methods"])
    code: str = Field(description="Stable code of the error.", examples=["invalid_request"])
    request_id: str | None = Field(
        description="Names this request in the service's log.", examples=["0192f0c1d2e34f5a8b6c7d8e9f0a1b2c"]
    )
    errors: list[ProblemEntry] = Field(
        description="Every single problem, when the request has several or a place; at most a hundred.",
        max_length=MAX_LISTED,
    )
    error_count: int = Field(description="How many problems there are, listed or not.", examples=[1])


def status_of(error: type[AppError]) -> int:
    """Return the HTTP status of an error class, by its family."""
    for family in error.__mro__:
        if family in STATUS_BY_FAMILY:
            return STATUS_BY_FAMILY[family]
    raise LookupError(f"{error.__name__} belongs to no family with an HTTP status")


def problem_of(error: AppError, *, language: Language = DEFAULT_LANGUAGE, instance: str = "") -> Problem:
    """Return the problem document of `error`."""
    status = status_of(type(error))
    return Problem(
        type=f"urn:deepe:problem:{error.code}",
        title=text(f"problem_title_{status}", language),
        status=status,
        detail=error.detail(language),
        instance=instance,
        code=error.code,
        request_id=request_id.get(),
        errors=problem_entries(error.violations(), language),
        error_count=error.violation_count(),
    )


def problem_entries(violations: Sequence[Violation], language: Language) -> list[ProblemEntry]:
    """Return the first violations in the caller's language."""
    return [
        ProblemEntry(pointer=violation.pointer, code=violation.code, detail=violation.detail(language))
        for violation in violations[:MAX_LISTED]
    ]


def problem_entry(error: AppError, language: Language) -> ProblemEntry:
    """Return an error as an entry of a list."""
    return ProblemEntry(pointer="", code=error.code, detail=error.detail(language))


def problem_response(connection: HTTPConnection, exc: Exception) -> Response:
    """Return the problem document of any exception. Log unexpected ones."""
    error = translate(exc)
    if isinstance(error, MethodNotAllowed):
        error = _allowed_here(connection.scope)
    _log(error, exc)
    language = negotiate(connection.headers.get("accept-language"))
    problem = problem_of(error, language=language, instance=quote(connection.url.path, safe="/:@!$&'()*+,;=%~"))
    # "replace": a lone surrogate from a file name must not turn an error into a crash
    body = json.dumps(problem.model_dump(), ensure_ascii=False).encode("utf-8", "replace")
    headers = {**language_headers(language), "Cache-Control": "no-store", **_headers(error)}
    return Response(body, status_code=problem.status, headers=headers, media_type=PROBLEM_MEDIA_TYPE)


def translate(exc: Exception) -> AppError:
    """Return the typed error that says what `exc` means to a caller."""
    match exc:
        case AppError():
            return exc
        case RequestValidationError():
            return _invalid_request(exc)
        case HTTPException():
            return _from_http(exc)
        case sqlalchemy.exc.TimeoutError():
            return DatabaseBusy()
        case sqlalchemy.exc.DBAPIError():
            return _from_database(exc)
        # a refused connection reaches us as asyncpg met it; other clients of ours have their own error types
        case ConnectionError():
            return DatabaseUnavailable()
        case OSError() if exc.errno in _FULL_ERRORS:
            return StorageFull()
        case _:
            return _internal()


def problem_responses(*errors: type[AppError]) -> dict[int | str, dict[str, Any]]:
    """Return `responses=` of a route: its errors by status.

    `describe_problems` puts the texts in when the document is requested: a start reads none of them.
    """
    by_status: dict[int | str, dict[str, Any]] = {}
    for error in sorted(set(errors), key=lambda error: error.code):
        empty = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        entry = by_status.setdefault(status_of(error), {"description": "", "content": {PROBLEM_MEDIA_TYPE: empty}})
        entry["content"][PROBLEM_MEDIA_TYPE]["examples"][error.code] = {}
    return by_status


def describe_problems(responses: Mapping[str, dict[str, Any]]) -> None:
    """Write descriptions and examples into what `problem_responses` returned."""
    for status, response in responses.items():
        examples = response.get("content", {}).get(PROBLEM_MEDIA_TYPE, {}).get("examples", {})
        if examples:
            response["description"] = text(f"problem_title_{status}")
        for code in examples:
            examples[code] = {"value": _example(code, int(status))}


def install_error_handlers(app: FastAPI) -> None:
    """Replace FastAPI's own error bodies; what is raised besides reaches `GuardMiddleware`."""

    async def handle(request: Request, exc: Exception) -> Response:
        return problem_response(request, exc)

    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(RequestValidationError, handle)


def _invalid_request(exc: RequestValidationError) -> InvalidRequest:
    """Convert the first errors only. Count the rest."""
    complaints = exc.errors()
    found = violations_of(complaints[: 10 * MAX_LISTED], exc.body)
    return InvalidRequest(found, count=len(found) + max(0, len(complaints) - 10 * MAX_LISTED))


def _from_http(exc: HTTPException) -> AppError:
    if exc.__cause__ is not None and isinstance(exc.__cause__, AppError):
        return exc.__cause__  # raised by a guard while FastAPI read the body
    match exc.status_code:
        case 404:
            return RouteNotFound()
        case 405:
            return MethodNotAllowed(method="", allowed=(exc.headers or {}).get("Allow", ""))
        case status if status < 500:
            return BadRequest()
        case _:
            return _internal()


def _allowed_here(scope: Scope) -> MethodNotAllowed:
    """Ask every route: the exception knows the methods of the first one with this path only."""
    allowed = [
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in scope["app"].router.routes)
    ]
    if "GET" in allowed:
        allowed.insert(allowed.index("GET") + 1, "HEAD")
    return MethodNotAllowed(method=scope["method"], allowed=", ".join(allowed))


def _from_database(exc: sqlalchemy.exc.DBAPIError) -> AppError:
    state = getattr(exc.orig, "sqlstate", None)
    message = str(exc.orig).lower()
    if state in _FULL_STATES or "disk is full" in message:
        return StorageFull()
    if state in _BUSY_STATES or "database is locked" in message or "database table is locked" in message:
        return DatabaseBusy()
    unreachable = isinstance(exc, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
    return DatabaseUnavailable() if unreachable or exc.connection_invalidated else _internal()


def _internal() -> InternalError:
    return InternalError(request_id=request_id.get() or "-")


def _headers(error: AppError) -> dict[str, str]:
    match error:
        case Unauthenticated():
            return {"WWW-Authenticate": 'Bearer realm="deepe"'}
        case MethodNotAllowed():
            return {"Allow": str(error.params.get("allowed", ""))}
        case TooMany():
            return {"Retry-After": str(error.params["seconds"])}
        case Unavailable():
            return {"Retry-After": "1" if isinstance(error, DatabaseBusy) else "5"}
        case _:
            return {}


def _log(error: AppError, exc: Exception) -> None:
    if isinstance(error, InternalError):
        logger.error("unhandled_error", exc_info=exc)
    elif isinstance(error, Unavailable | StorageFull):
        logger.warning(error.code, extra={"error": f"{type(exc).__name__}: {exc}"})


def _example(code: str, status: int) -> dict[str, Any]:
    entries: Sequence[dict[str, str]] = ()
    if code == InvalidRequest.code:
        entries = [{"pointer": "/name", "code": "field_required", "detail": text("field_required")}]
    return {
        "type": f"urn:deepe:problem:{code}",
        "title": text(f"problem_title_{status}"),
        "status": status,
        "detail": text(code, count=len(entries)),
        "instance": "/api/v1/methods",
        "code": code,
        "request_id": "0192f0c1d2e34f5a8b6c7d8e9f0a1b2c",
        "errors": list(entries),
        "error_count": len(entries),
    }
