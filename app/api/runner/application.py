"""The application on the runner's port, and what sends requests of that port to it."""

from collections.abc import Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response
from app.api.guards import AccessPolicy, GuardMiddleware, Observer, RequestContextMiddleware
from app.api.runner.answers import html_answer
from app.domain.errors import AppError


def runner_application(
    routes: Sequence[Route], access: AccessPolicy, *, max_body_bytes: int, metrics: Observer | None = None
) -> ASGIApp:
    """Return the application that answers DeepExtension's backend."""
    application = Starlette(
        routes=routes,
        middleware=[
            Middleware(RequestContextMiddleware, metrics=metrics),
            Middleware(GuardMiddleware, policy=access, max_bytes=max_body_bytes),
        ],
        exception_handlers={HTTPException: _as_html, AppError: _as_problem},
    )
    application.router.redirect_slashes = False
    return application


class ByPort:
    """Send the requests that came in at one port to an application of their own."""

    def __init__(self, app: ASGIApp, *, port: int, application: ASGIApp) -> None:
        self._app = app
        self._port = port
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server") if scope["type"] == "http" else None
        is_theirs = server is not None and server[1] == self._port
        await (self._application if is_theirs else self._app)(scope, receive, send)


async def _as_html(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return html_answer(exc.status_code, HTTPStatus(exc.status_code).description, headers=exc.headers)


async def _as_problem(request: Request, exc: Exception) -> Response:
    return problem_response(request, exc)
