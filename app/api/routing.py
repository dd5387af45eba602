"""Routes that say who may call them, and read, check and parse a JSON body once, before anything else of them runs.

A router names what its changes need (`changes`); its other routes need the permission to read (`reads`). `needs` names
another permission for one route, `needs(None)` opens it to everybody.
"""

import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from app.api.bodies import parse_json
from app.api.errors import UnsupportedMediaType
from app.api.guards import CALLER, RAW_BODY, TokenMissing
from app.domain.access import Caller, Permission
from app.domain.audit import current_action

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])

_PERMISSION: Final = "__needed_permission__"
_LICENCE: Final = "__needs_licence__"
_ROUTER: Final = "__router__"
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
        needed = permission_of(self)
        with_json = not _WITH_BODY.isdisjoint(self.methods or ())

        async def handle_permitted(request: Request) -> Response:
            _name_action(request, self)
            if needed is not None:
                caller_of(request).require(needed)
            if not with_json or request.scope.get(RAW_BODY):
                return await handle(request)
            body = await request.body()
            if body:
                _check_content_type(request)
                request = _JsonRequest(request, body, parse_json(body))
            return await handle(request)

        return handle_permitted

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Leave `/jobs/x:cancel` to the route of that action: no id and no name ends like this."""
        match, child = super().matches(scope)
        if match is not Match.NONE and _ACTION.search(scope["path"], scope["path"].rfind("/")):
            last = self.path.rpartition("/")[2]
            if last.endswith("}") and not last.endswith(":path}"):
                return Match.NONE, {}
        return match, child


class Router(APIRouter):
    """A router whose routes are `JsonRoute`s: those with GET need `reads`, all others `changes`."""

    def __init__(self, *, changes: Permission, reads: Permission = Permission.READ, **options: Any) -> None:
        super().__init__(route_class=JsonRoute, **options)
        self._changes = changes
        self._reads = reads

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        only_reads = set(options.get("methods") or ["GET"]) == {"GET"}
        if not hasattr(endpoint, _PERMISSION):
            needs(self._reads if only_reads else self._changes)(endpoint)
        setattr(endpoint, _ROUTER, self)
        if not only_reads and getattr(endpoint, _PERMISSION) not in (None, Permission.READ):
            # first in, last out: what the others write is committed by then
            options["dependencies"] = [Depends(_recorded, scope="function"), *(options.get("dependencies") or ())]
        super().add_api_route(path, endpoint, **options)


def needs(permission: Permission | None) -> Callable[[EndpointT], EndpointT]:
    """Name what the route of a function needs, where it is not what its router says; None opens it to everybody."""

    def mark(endpoint: EndpointT) -> EndpointT:
        setattr(endpoint, _PERMISSION, permission)
        return endpoint

    return mark


def licensed(endpoint: EndpointT) -> EndpointT:
    """Say of a route that a licence decides whether it does anything; what it calls asks for that."""
    setattr(endpoint, _LICENCE, True)
    return endpoint


def needs_licence(endpoint: Callable[..., Any]) -> bool:
    """Return whether the route of a function was said to need a licence."""
    return getattr(endpoint, _LICENCE, False)


def router_of(endpoint: Callable[..., Any]) -> Router:
    """Return the router of a route's function."""
    router: Router = getattr(endpoint, _ROUTER)
    return router


def permission_of(route: APIRoute) -> Permission | None:
    """Return what the route needs; `AttributeError` for a route of no `Router`."""
    permission: Permission | None = getattr(route.endpoint, _PERMISSION)
    return permission


def caller_of(request: Request) -> Caller:
    """Return who sent the request; raise `TokenMissing` where an open path was called without a token."""
    caller: Caller | None = request.scope.get(CALLER)
    if caller is None:
        raise TokenMissing
    return caller


def _name_action(request: Request, route: APIRoute) -> None:
    """Say for the audit trail which operation runs, and on what."""
    action = current_action.get()
    if action is not None:
        action.operation = route.name
        action.subject = {name.replace("_", "-"): str(value) for name, value in request.path_params.items()}


async def _recorded(request: Request) -> AsyncIterator[None]:
    """Record what no transaction did: changed files, and that something was done which changes no row."""
    done = False
    try:
        yield
        done = True
    finally:
        action = current_action.get()
        services = getattr(request.app.state, "services", None)
        if services is not None and action is not None and (action.files or (done and not action.recorded)):
            await services.audit.record(action)


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    accepted = ["application/json"]
    if request.method == "PATCH":
        accepted.append("application/merge-patch+json")
    kind, _, parameters = content_type.lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters)
    if kind.strip() not in accepted or (charset and charset[1] not in {"utf-8", "utf8", "us-ascii"}):
        raise UnsupportedMediaType(given=content_type or "-", expected=", ".join(accepted))
