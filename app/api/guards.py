"""What every request passes before a route sees it: pure ASGI, from the outside in.

`RequestContextMiddleware` names the request and logs it; `ProblemMiddleware` turns whatever is raised further in into
a problem document; `AccessMiddleware` asks who calls and from where; `BodyMiddleware` asks what the body is.
"""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.loopback import is_loopback
from app.api.bodies import check_json
from app.api.errors import UnsupportedMediaType, problem_response
from app.domain.errors import NotAllowed, TooLarge, Unauthenticated
from app.observability import ACCESS_LOGGER, request_id

access_logger = logging.getLogger(ACCESS_LOGGER)

JSON_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
# what a proxy adds to the requests that it passes on
_PROXY_HEADERS: Final = frozenset({"forwarded", "via", "x-real-ip"})
_PROXY_PREFIX: Final = "x-forwarded-"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METRICS_PATH: Final = "/metrics"
_QUIET_PATHS = frozenset({"/healthz", "/readyz", METRICS_PATH})


class TokenMissing(Unauthenticated):
    """No `Authorization: Bearer ...` header."""

    code = "token_missing"


class TokenWrong(Unauthenticated):
    """A token, but not ours."""

    code = "token_wrong"


class ForeignHost(NotAllowed):
    """Without a token: the request names a host that is not this machine (DNS rebinding)."""

    code = "foreign_host"


class ForeignOrigin(NotAllowed):
    """A web page of another origin calls."""

    code = "foreign_origin"


class ForeignClient(NotAllowed):
    """Without a token: the request comes from another machine."""

    code = "foreign_client"


class ThroughProxy(NotAllowed):
    """Without a token: a proxy passed the request on, so its caller may be on any machine."""

    code = "through_proxy"


class BodyTooLarge(TooLarge):
    """The body is over the limit of its address."""

    code = "body_too_large"


class UnsupportedEncoding(UnsupportedMediaType):
    """A compressed body."""

    code = "unsupported_encoding"


@dataclass(frozen=True)
class RawUpload:
    """Addresses that take a raw body of any content type: `pattern` must match the whole path."""

    method: str
    pattern: re.Pattern[str]
    max_bytes: int


@dataclass(frozen=True)
class AccessPolicy:
    """Who may call. With a token: who has it. Without: this machine, but no proxy and no foreign web page."""

    token: str | None = None
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    metrics_token: str | None = None
    """Opens `/metrics` and nothing else, so that a monitoring system need not hold the token of everything."""
    open_paths: Sequence[str] = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
    """Paths that need no token: probes have none, and a browser cannot send one when it opens the documentation."""


class RequestContextMiddleware:
    """Give every request an id (the caller's `X-Request-Id`, else a new one) and one line in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        current = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status, started = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = current
            await send(message)

        token = request_id.set(current)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _log_request(scope, status, time.perf_counter() - started)
            request_id.reset(token)


class ProblemMiddleware:
    """Answer with a problem document, whatever was raised; an answer already begun is cut off instead."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception as exc:
            if started:
                raise  # the server closes the connection, so that the caller sees a broken answer, not a short one
            response = problem_response(HTTPConnection(scope), exc)
            await response(scope, receive, send)


class AccessMiddleware:
    """Enforce the `AccessPolicy`."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app = app
        self._policy = policy
        self._token = policy.token.encode() if policy.token else None
        self._metrics_token = policy.metrics_token.encode() if policy.metrics_token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"}:
            self._check(scope, Headers(scope=scope))
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and not self._is_own_origin(origin, host):
            raise ForeignOrigin(origin=origin)
        if self._token is not None:
            if not self._is_open(scope["path"]):
                accepted = [self._token]
                if scope["path"] == METRICS_PATH and self._metrics_token is not None:
                    accepted.append(self._metrics_token)
                self._check_token(headers.get("authorization", ""), accepted)
            return
        name = host_name(host)
        if name is None or not (is_loopback(name) or name in self._policy.allowed_hosts):
            raise ForeignHost(host=host or "-")
        client = scope.get("client")
        if client is not None and not is_loopback(client[0]):
            raise ForeignClient(address=client[0])
        proxied = next((header for header in headers if _is_of_proxy(header)), None)
        if proxied is not None:
            raise ThroughProxy(header=proxied)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        if origin.lower() in self._policy.allowed_origins:
            return True
        parts = urlsplit(origin.lower())
        return parts.scheme in {"http", "https"} and parts.netloc != "" and parts.netloc == host.lower()

    def _is_open(self, path: str) -> bool:
        return path in self._policy.open_paths or path.startswith("/docs/static/")

    def _check_token(self, authorization: str, accepted: Sequence[bytes]) -> None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise TokenMissing
        given = token.strip().encode("utf-8", "replace")
        if not any(hmac.compare_digest(given, expected) for expected in accepted):
            raise TokenWrong


class BodyMiddleware:
    """Bound every body; read and check those that must be JSON, so that a route meets only what it can parse."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, uploads: Sequence[RawUpload] = ()) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._uploads = tuple(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _may_have_body(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise UnsupportedEncoding(given=encoding)
        upload = self._upload(scope)
        limit = upload.max_bytes if upload else self._max_bytes
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise BodyTooLarge(limit=limit)
        counted = _counting(receive, limit)
        if upload is None and scope["method"] in JSON_METHODS:
            body = await _read_json(scope["method"], headers.get("content-type"), counted)
            counted = _replaying(body, receive)
        await self._app(scope, counted, send)

    def _upload(self, scope: Scope) -> RawUpload | None:
        matching = (
            upload
            for upload in self._uploads
            if upload.method == scope["method"] and upload.pattern.fullmatch(scope["path"])
        )
        return next(matching, None)


def _is_of_proxy(header: str) -> bool:
    return header in _PROXY_HEADERS or header.startswith(_PROXY_PREFIX)


def host_name(host: str) -> str | None:
    """Return the lower-case name or address of a `Host` header without its port; None when it is no such header."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::(\d{1,5}))?", host)
    return match[1].strip("[]").lower() if match else None


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS and status < 400 else logging.INFO
    access_logger.log(
        level,
        "http_request",
        extra={
            "method": scope["method"],
            "path": scope["path"],  # without the query: it may hold what nobody wants in a log
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
        },
    )


def _may_have_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return scope["method"] in JSON_METHODS or b"content-length" in names or b"transfer-encoding" in names


def _counting(receive: Receive, limit: int) -> Receive:
    received = 0

    async def count() -> Message:
        nonlocal received
        message = await receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            if received > limit:
                raise BodyTooLarge(limit=limit)
        return message

    return count


async def _read_json(method: str, content_type: str | None, receive: Receive) -> bytes:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if chunk and not chunks:
            _check_content_type(method, content_type)
        chunks.append(chunk)
    body = b"".join(chunks)
    if body:
        check_json(body)
    return body


def _check_content_type(method: str, content_type: str | None) -> None:
    accepted = ["application/json"]
    if method == "PATCH":
        accepted.append("application/merge-patch+json")
    kind, _, parameters = (content_type or "").lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters)
    if kind.strip() not in accepted or (charset and charset[1] not in {"utf-8", "utf8", "us-ascii"}):
        raise UnsupportedMediaType(given=content_type or "-", expected=", ".join(accepted))


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Hand the body that was read to the application, then whatever the server says next (a disconnect)."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
