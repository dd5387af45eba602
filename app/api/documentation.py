"""The OpenAPI document, and its interactive page that works without internet access."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from app.access.keys import KeyExpired, KeyRevoked, KeyUnknown
from app.api.bodies import JsonBadNumber, JsonNotUtf8, JsonTooDeep, JsonTooManyValues, MalformedJson
from app.api.conditional import InvalidIfMatch, StaleVersion
from app.api.errors import (
    PROBLEM_MEDIA_TYPE,
    DatabaseBusy,
    DatabaseUnavailable,
    InternalError,
    PreconditionRequired,
    Problem,
    StorageFull,
    UnsupportedMediaType,
    describe_problems,
    problem_responses,
)
from app.api.guards import (
    AccessPolicy,
    BodyTooLarge,
    ForeignClient,
    ForeignHost,
    ForeignOrigin,
    PathNotUtf8,
    ThroughProxy,
    TokenMissing,
    TokenWrong,
)
from app.api.headers import IDEMPOTENCY_KEY, IF_MATCH, IF_NONE_MATCH
from app.api.idempotency import IdempotencyKeyReused, InvalidIdempotencyKey
from app.api.limits import TooManyRequests, TooManyStreams
from app.api.pagination import InvalidCursor, InvalidSort
from app.domain.access import PermissionMissing
from app.domain.errors import AppError, InvalidRequest

STATIC: Final = Path(__file__).parent / "static"
SWAGGER_UI: Final = ("fastapi_swagger", "resources")
"""Package and folder of Swagger UI's bundle and style sheet; nothing of the package is imported."""

# what our dependencies refuse, by the parameter that they read
_ERRORS_OF_PARAMETERS: Final[Mapping[str, Sequence[type[AppError]]]] = {
    IF_MATCH: (PreconditionRequired, StaleVersion, InvalidIfMatch),
    IDEMPOTENCY_KEY: (InvalidIdempotencyKey, IdempotencyKeyReused),
    "cursor": (InvalidCursor,),
    "sort": (InvalidSort,),
}

# no address but our own; Swagger UI shows its icons from data: URLs
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DeepExtension API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/static/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/swagger-ui-bundle.js"></script>
<script src="docs/static/start.js"></script>
</body>
</html>
"""


def operation_id(route: APIRoute) -> str:
    """Return the name of the route's function: `list_methods` reads well in generated clients."""
    return route.name


class DocumentedApp(FastAPI):
    """FastAPI with this service's OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document(self)
        return self.openapi_schema


def install_documentation(app: FastAPI) -> None:
    """Serve `/openapi.json` and `/docs`, and redirect a browser from `/` to them."""

    async def document(_request: Request) -> Response:
        return JSONResponse(app.openapi())

    async def page(_request: Request) -> Response:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    async def start(_request: Request) -> Response:
        return RedirectResponse("docs")

    app.add_route("/openapi.json", document, include_in_schema=False)
    app.add_route("/docs", page, include_in_schema=False)
    app.add_route("/", start, include_in_schema=False)
    app.mount("/docs/static", StaticFiles(directory=STATIC, packages=[SWAGGER_UI]))


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the document with our problem documents in place of FastAPI's error bodies, on every operation."""
    document = _with_plain_names(
        get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= problem.pop("$defs")
    schemas["Problem"] = problem
    # the empty requirement: a service on a loopback address may run without a token
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"token": []}]
    for path, operations in document.get("paths", {}).items():
        for method, operation in operations.items():
            _document_errors(operation, path=path, method=method)
    return document


def _with_plain_names(document: dict[str, Any]) -> dict[str, Any]:
    """Call `Page_JobSummary_` `JobSummaryPage`: the name becomes that of a class in generated clients."""
    named = re.sub(
        r"Page(?:_(\w+)_|\[(\w+)\])(?=\")", lambda found: f"{found[1] or found[2]}Page", json.dumps(document)
    )
    plain: dict[str, Any] = json.loads(named)
    return plain


def _document_errors(operation: dict[str, Any], *, path: str, method: str) -> None:
    """Add the errors that the guards and the foundation give, beside those that the route names itself."""
    errors: list[type[AppError]] = [InternalError, ForeignHost, ForeignOrigin, ForeignClient, ThroughProxy]
    if path not in AccessPolicy.open_paths:
        errors += [TokenMissing, TokenWrong, KeyUnknown, KeyExpired, KeyRevoked]
    if path.startswith("/api/"):
        errors += [PermissionMissing, TooManyRequests]
        errors += [DatabaseUnavailable, DatabaseBusy]
    if "{" in path:
        errors.append(PathNotUtf8)
    if method in {"post", "put", "patch"}:
        errors += [BodyTooLarge, StorageFull]
    if "text/event-stream" in operation["responses"].get("200", {}).get("content", {}):
        errors.append(TooManyStreams)
    if _takes_json(operation):
        errors += [MalformedJson, JsonNotUtf8, JsonTooDeep, JsonTooManyValues, JsonBadNumber, UnsupportedMediaType]
    parameters = operation.get("parameters", ())
    names = {parameter["name"] for parameter in parameters}
    for parameter in parameters:
        if parameter["name"] == IF_MATCH and IF_NONE_MATCH not in names:
            parameter["required"] = True  # to the framework it is optional: what it lacks is 428, not 422
        errors += _ERRORS_OF_PARAMETERS.get(parameter["name"], ())
    responses = operation["responses"]
    if "HTTPValidationError" in json.dumps(responses.get("422", {})):
        del responses["422"]
    if _takes_json(operation) or operation.get("parameters"):
        errors.append(InvalidRequest)
    for status, ours in problem_responses(*errors).items():
        theirs = responses.setdefault(str(status), ours)
        examples = theirs.get("content", {}).get(PROBLEM_MEDIA_TYPE, {}).get("examples")
        if theirs is not ours and examples is not None:
            examples |= ours["content"][PROBLEM_MEDIA_TYPE]["examples"]
    describe_problems(responses)
    operation["responses"] = dict(sorted(responses.items()))


def _takes_json(operation: dict[str, Any]) -> bool:
    content = operation.get("requestBody", {}).get("content", {})
    return any(kind.endswith("json") for kind in content)
