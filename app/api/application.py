"""Build the FastAPI application that all routers are included in: handlers, guards and documentation in order."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app.api.documentation import DocumentedApp, install_documentation, operation_id
from app.api.errors import install_error_handlers
from app.api.guards import AccessPolicy, GuardMiddleware, RawUpload, RequestContextMiddleware
from app.api.limits import CallerLimits
from app.api.prometheus import HttpMetrics
from app.domain.errors import Violation

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
_DESCRIPTION = """Register training methods, run their stages, keep the models they make.

Errors are problem documents (RFC 9457) with a stable `code`; texts come in English, Chinese and German by
`Accept-Language`. Creates take an `Idempotency-Key`, changes an `If-Match` with the `ETag` that was read.
Lists are pages: follow `next_cursor`. Streams are server-sent events and resume from `Last-Event-ID`."""
_EXPOSED_HEADERS = ("ETag", "Location", "Retry-After", "X-Request-Id", "Idempotency-Replayed", "Content-Language")


@dataclass(frozen=True)
class HttpOptions:
    """What the HTTP layer needs to know of the settings."""

    version: str
    access: AccessPolicy = field(default_factory=AccessPolicy)
    max_body_bytes: int = 4 * 1024 * 1024
    uploads: Sequence[RawUpload] = ()
    limits: CallerLimits | None = None
    metrics: HttpMetrics | None = None
    notices: Callable[[], Sequence[Violation]] = tuple
    """Returns what everybody who asks who they are should be told."""


def new_application(options: HttpOptions, *, lifespan: Lifespan | None = None) -> FastAPI:
    """Return an application without routes of its own, save the documentation."""
    app = DocumentedApp(
        title="DeepExtension training methods",
        version=options.version,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        generate_unique_id_function=operation_id,
        separate_input_output_schemas=False,
    )
    configure_http(app, options)
    return app


def configure_http(app: FastAPI, options: HttpOptions) -> None:
    """Install error handlers, guards and documentation; call it once, before the first request."""
    app.state.notices = options.notices
    install_error_handlers(app)
    install_documentation(app)
    # the last one added is the outermost
    app.add_middleware(
        GuardMiddleware,
        policy=options.access,
        max_bytes=options.max_body_bytes,
        uploads=options.uploads,
        limits=options.limits,
    )
    if options.access.allowed_origins:
        # outside the guards: a browser's preflight carries no token, and a refusal must be readable for the page
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.access.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=list(_EXPOSED_HEADERS),
        )
    app.add_middleware(RequestContextMiddleware, metrics=options.metrics)
