"""Routes that read, check and parse a JSON body once, before anything else of the route runs."""

import re
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from app.api.bodies import parse_json
from app.api.errors import UnsupportedMediaType
from app.api.guards import RAW_BODY

_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_ACTION: Final = re.compile(r":[a-z][a-z-]*\Z")


class _JsonRequest(Request):
    """A request whose body was parsed already."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._value = value

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route that takes JSON only, unless its address is one of the raw uploads."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if _WITH_BODY.isdisjoint(self.methods or ()):
            return handle

        async def handle_json(request: Request) -> Response:
            if request.scope.get(RAW_BODY):
                return await handle(request)
            body = await request.body()
            if body:
                _check_content_type(request)
                request = _JsonRequest(request, body, parse_json(body))
            return await handle(request)

        return handle_json

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Leave `/jobs/x:cancel` to the route of that action: no id and no name ends like this."""
        match, child = super().matches(scope)
        if match is not Match.NONE and _ACTION.search(scope["path"], scope["path"].rfind("/")):
            last = self.path.rpartition("/")[2]
            if last.endswith("}") and not last.endswith(":path}"):
                return Match.NONE, {}
        return match, child


class Router(APIRouter):
    """A router whose routes are `JsonRoute`s."""

    def __init__(self, **options: Any) -> None:
        super().__init__(route_class=JsonRoute, **options)


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    accepted = ["application/json"]
    if request.method == "PATCH":
        accepted.append("application/merge-patch+json")
    kind, _, parameters = content_type.lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters)
    if kind.strip() not in accepted or (charset and charset[1] not in {"utf-8", "utf8", "us-ascii"}):
        raise UnsupportedMediaType(given=content_type or "-", expected=", ".join(accepted))
