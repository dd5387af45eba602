"""What the caller can do with the things of a list, and where not, why.

Actions are the routes of the list's router that change something below its address, called as in the OpenAPI document.
"""

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import Field

from app.api.errors import ProblemEntry, problem_entry
from app.api.routing import caller_of, needs_licence, permission_of, router_of
from app.domain.access import Caller
from app.domain.errors import AppError
from app.domain.texts import Language
from app.domain.values import Value

Endpoint = Callable[..., Any]


class Ability(Value):
    """Whether the caller may do something."""

    allowed: bool
    reason: ProblemEntry | None = Field(description="Why not, and what to do; null: it is allowed.")


def abilities(request: Request, language: Language) -> Mapping[str, Ability]:
    """Return the actions of the list that the request asks for, by their `operationId`."""
    endpoint = request.scope["endpoint"]
    found = dict(_by_role(endpoint, caller_of(request), language))
    for route in _actions(endpoint):
        ability = found[route.name]
        if ability.allowed and needs_licence(route.endpoint) and (error := _licence_error(request)) is not None:
            found[route.name] = Ability(allowed=False, reason=problem_entry(error, language))
    return found


@lru_cache(maxsize=4096)
def _by_role(endpoint: Endpoint, caller: Caller, language: Language) -> Mapping[str, Ability]:
    return {route.name: _ability(route, caller, language) for route in _actions(endpoint)}


@cache
def _actions(endpoint: Endpoint) -> tuple[APIRoute, ...]:
    routes = [route for route in router_of(endpoint).routes if isinstance(route, APIRoute)]
    path = next(route.path for route in routes if route.endpoint is endpoint)
    below = (f"{path}/{{", f"{path}:")
    return tuple(
        route for route in routes if route.methods != {"GET"} and (route.path == path or route.path.startswith(below))
    )


def _ability(route: APIRoute, caller: Caller, language: Language) -> Ability:
    needed = permission_of(route)
    try:
        if needed is not None:
            caller.require(needed)
    except AppError as error:
        return Ability(allowed=False, reason=problem_entry(error, language))
    return Ability(allowed=True, reason=None)


def _licence_error(request: Request) -> AppError | None:
    try:
        request.app.state.services.licence.require()
    except AppError as error:
        return error
    return None
