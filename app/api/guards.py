"""What every request passes before a route sees it: two pure ASGI middlewares, from the outside in.

`RequestContextMiddleware` names the request, measures and logs it, and answers HEAD where GET is answered.
`GuardMiddleware` asks who calls and from where, bounds the body, and turns whatever is raised further in into a problem
document. What the caller may do, and what a JSON body holds, is checked by the route (`app.api.routing`): an address
without that method is 405 whatever was sent to it.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.keys import PREFIX as KEY_PREFIX
from app.access.loopback import is_loopback
from app.access.persons import is_signed_token
from app.api.caller_address import Networks, caller_address
from app.api.errors import BadRequest, UnsupportedMediaType, problem_response
from app.api.limits import CallerLimits
from app.domain.access import LOCAL, METRICS, NETWORK, TOKEN, Caller, Permission, current_caller
from app.domain.audit import Action, acting, action_of, current_action
from app.domain.errors import NotAllowed, TooLarge, Unauthenticated
from app.domain.projects import DEFAULT_PROJECT
from app.observability import ACCESS_LOGGER, request_id

access_logger = logging.getLogger(ACCESS_LOGGER)

RAW_BODY: Final = "deepe.raw_body"
"""Set in the scope of a request whose body is bytes of a file, not JSON."""
CALLER: Final = "deepe.caller"
"""The `Caller` in the scope of a request; None where an open path was called without a token."""
PROJECT: Final = "deepe.project"
"""Id of the project that a request is about, in its scope."""
ADDRESS: Final = "deepe.address"
"""Where a request came from, in its scope; for records only: it permits nothing."""
_FULL_PATH: Final = "deepe.path"
_IN_PROJECT: Final = re.compile(r"/projects/(?P<project>[^/]+)(?P<path>/.*)", re.DOTALL)
# what a proxy adds to the requests that it passes on
_PROXY_HEADERS: Final = frozenset({"forwarded", "via", "x-real-ip"})
_PROXY_PREFIX: Final = "x-forwarded-"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METRICS_PATH: Final = "/metrics"
_SECURITY_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    # pages of the same host show its pictures, on whatever port they are
    ("Cross-Origin-Resource-Policy", "same-site"),
)
"""On every answer that says nothing else itself. The page of the documentation has a policy of its own."""
_QUIET_PATHS = frozenset({"/healthz", "/readyz", "/health", METRICS_PATH})


class TokenMissing(Unauthenticated):
    """No `Authorization: Bearer ...` header."""

    code = "token_missing"


class TokenWrong(Unauthenticated):
    """The token is not the one of this service."""

    code = "token_wrong"


class ForeignHost(NotAllowed):
    """Without a token: the request names a host that is not this machine (DNS rebinding)."""

    code = "foreign_host"


class ForeignOrigin(NotAllowed):
    """The request comes from a web page of another origin."""

    code = "foreign_origin"


class ForeignClient(NotAllowed):
    """Without a token: the request comes from another machine."""

    code = "foreign_client"


class ThroughProxy(NotAllowed):
    """Without a token: a proxy passed the request on, so its caller may be on any machine."""

    code = "through_proxy"


class PathNotUtf8(BadRequest):
    """The path is not valid UTF-8."""

    code = "path_not_utf8"


class BodyTooLarge(TooLarge):
    """The body exceeds the limit of the route."""

    code = "body_too_large"


class UnsupportedEncoding(UnsupportedMediaType):
    """The body is compressed."""

    code = "unsupported_encoding"


FindCaller = Callable[[str], Awaitable[Caller]]
EnterProject = Callable[[Caller, str | None], Awaitable[Caller]]


@dataclass(frozen=True)
class RawUpload:
    """Addresses that take a raw body of any content type: `pattern` must match the whole path."""

    method: str
    pattern: re.Pattern[str]
    max_bytes: int


@dataclass(frozen=True)
class AccessPolicy:
    """Who may call: who has a key, a signed token or the token.

    Without a token of the settings: this machine, but no proxy and no foreign web page.
    """

    token: str | None = None
    keys: FindCaller | None = None
    """Returns whose secret an API key is, or raises `Unauthenticated`."""
    persons: FindCaller | None = None
    """Returns the person that a signed token names, or raises `Unauthenticated`."""
    enter: EnterProject | None = None
    """Returns the caller in the project that an address names, or raises; None: there are no projects here."""
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    metrics_token: str | None = None
    """Opens `/metrics` and nothing else, so that a monitoring system need not hold the token of everything."""
    trusted_networks: Sequence[IPv4Network | IPv6Network] = ()
    """Callers from there need no token, as long as neither a proxy nor a web page stands between."""
    open_paths: Sequence[str] = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/api/v1/login")
    """Paths that need no token: probes have none, a browser cannot send one when it opens the documentation, and who
    asks how to log in is not logged in."""
    proxies: Networks = ()
    """What stands in front of the service and says where a request came from."""
    refused: Callable[[Action, str], None] | None = None
    """Takes note of a change that was not permitted and of a wrong token, with the code of the error."""
    needed: Permission | None = None
    """What every caller of this application must be permitted, where its routes do not say it themselves."""


class Observer(Protocol):
    """Measures requests."""

    def observe(self, scope: Scope, *, method: str, status: int, seconds: float) -> None:
        """Count a request whose answer began after `seconds`."""
        ...


class RequestContextMiddleware:
    """Give every request an id (the caller's `X-Request-Id`, else a new one) and one line in the log; measure it.

    A HEAD request goes in as a GET, and its answer comes back without the body.
    """

    def __init__(self, app: ASGIApp, metrics: Observer | None = None) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        current = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        method, status, started = scope["method"], 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = current
                for name, value in _SECURITY_HEADERS:
                    headers.setdefault(name, value)
                if self._metrics is not None:
                    seconds = time.perf_counter() - started
                    self._metrics.observe(scope, method=method, status=status, seconds=seconds)
            await send(message)

        token = request_id.set(current)
        try:
            if method == "HEAD":
                scope["method"] = "GET"
                await self._app(scope, receive, _without_body(send_with_id))
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            _log_request(scope, method, status, time.perf_counter() - started)
            request_id.reset(token)


class GuardMiddleware:
    """Refuse what may not come in; answer with a problem document, whatever was raised.

    An answer already begun is cut off instead.
    """

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        *,
        max_bytes: int,
        uploads: Sequence[RawUpload] = (),
        limits: CallerLimits | None = None,
    ) -> None:
        self._app = app
        self._limits = limits or CallerLimits()
        self._access = _AccessGuard(policy)
        self._enter = policy.enter
        self._refused = policy.refused
        self._proxies = policy.proxies
        self._body = _BodyGuard(max_bytes, uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        started, action = False, None
        prefix = ""

        async def watch(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if prefix:
                    _stay_in_project(MutableHeaders(scope=message), prefix)
            await send(message)

        try:
            headers = Headers(scope=scope)
            scope[ADDRESS] = caller_address((scope.get("client") or (None,))[0], headers, self._proxies)
            named = None
            if self._enter is not None and (found := _IN_PROJECT.fullmatch(scope["path"])) is not None:
                named, scope[_FULL_PATH], scope["path"] = found["project"], scope["path"], found["path"]
                prefix = f"/projects/{named}"
            caller = await self._access.caller(scope, headers)
            if caller is not None and self._enter is not None:
                caller = await self._enter(caller, named)
                scope[PROJECT] = caller.project or DEFAULT_PROJECT
            scope[CALLER] = caller
            current_caller.set(caller)
            action = _action_of(scope, caller)
            self._limits.admit(scope, caller, scope[ADDRESS])
            if scope["type"] == "http":
                _check_path(scope)
                receive = self._body.bounded(scope, headers, receive)
            with acting(action):
                await self._app(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception as exc:
            if self._refused is not None and (refused := _refusal_of(scope, action, exc)) is not None:
                self._refused(*refused)
            if started or scope["type"] != "http":
                raise  # the server closes the connection, so that the caller sees a broken answer, not a short one
            response = problem_response(HTTPConnection(scope), exc)
            await response(scope, receive, send)


def _refusal_of(scope: Scope, action: Action | None, error: Exception) -> tuple[Action, str] | None:
    """Return who was refused what, if the error says that: a change, or a token that is none of ours."""
    caller: Caller | None = scope.get(CALLER)
    if isinstance(error, Unauthenticated) and not isinstance(error, TokenMissing):
        # of a wrong token nothing is known but the name of a key that was valid once
        name = str(error.params.get("name", ""))
        action = Action("unknown", name, "", "authenticate", address=_address(scope), request_id=request_id.get())
        return action, error.code
    if not isinstance(error, NotAllowed) or scope.get("method") in ("GET", "HEAD"):
        return None
    if caller is None:
        action = Action("unknown", "", "", "authenticate", address=_address(scope), request_id=request_id.get())
        return action, error.code
    return (action, error.code) if action is not None else None


def _address(scope: Scope) -> str | None:
    """Return where a request came from, the peer of one that no guard has seen."""
    address: str | None = scope.get(ADDRESS) or (scope.get("client") or (None,))[0]
    return address


def _action_of(scope: Scope, caller: Caller | None) -> Action | None:
    """Return for the audit trail whose call a request is; its route adds what it is called."""
    if caller is None:
        return None
    operation = f"{scope.get('method', '')} {scope['path']}"
    return action_of(caller, operation=operation, address=_address(scope), request_id=request_id.get())


class _AccessGuard:
    """Enforces the `AccessPolicy`."""

    def __init__(self, policy: AccessPolicy) -> None:
        self._policy = policy
        self._token = policy.token.encode() if policy.token else None
        self._metrics_token = policy.metrics_token.encode() if policy.metrics_token else None
        self._slow_down = SlowDown()

    async def caller(self, scope: Scope, headers: Headers) -> Caller | None:
        """Return who calls, None for an open path without a token; raise an error for who may not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and not self._is_own_origin(origin, host):
            raise ForeignOrigin(origin=origin)
        secret = _bearer(headers)
        if secret is not None and (find := self._finder(secret)) is not None:
            return self._permitted(await self._slow_down.owner(scope, find(secret)))
        if origin is None and self._is_trusted(scope, headers):
            return NETWORK
        if self._token is not None:
            if self._is_open(scope["path"]):
                return None
            return self._permitted(await self._slow_down.owner(scope, self._owner(secret, scope["path"])))
        name = host_name(host)
        if name is None or not (is_loopback(name) or name in self._policy.allowed_hosts):
            raise ForeignHost(host=host or "-")
        client = scope.get("client")
        if client is not None and not is_loopback(client[0]):
            raise ForeignClient(address=client[0])
        proxied = next((header for header in headers if _is_of_proxy(header)), None)
        if proxied is not None:
            raise ThroughProxy(header=proxied)
        return LOCAL

    def _finder(self, secret: str) -> FindCaller | None:
        """Return what knows callers by secrets of this form; a token of the settings may have any form."""
        given = secret.encode("utf-8", "replace")
        tokens = [token for token in (self._token, self._metrics_token) if token is not None]
        if any(hmac.compare_digest(given, token) for token in tokens):
            return None
        if secret.startswith(KEY_PREFIX):
            return self._policy.keys
        return self._policy.persons if is_signed_token(secret) else None

    def _permitted(self, caller: Caller) -> Caller:
        if self._policy.needed is not None:
            caller.require(self._policy.needed)
        return caller

    async def _owner(self, secret: str | None, path: str) -> Caller:
        """Return whose token it is: the installation's, or the one of the metrics at their address."""
        if secret is None:
            raise TokenMissing
        given = secret.encode("utf-8", "replace")
        if self._token is not None and hmac.compare_digest(given, self._token):
            return TOKEN
        metrics = self._metrics_token if path == METRICS_PATH else None
        if metrics is not None and hmac.compare_digest(given, metrics):
            return METRICS
        raise TokenWrong

    def _is_trusted(self, scope: Scope, headers: Headers) -> bool:
        client = scope.get("client")
        if client is None or not self._policy.trusted_networks or any(map(_is_of_proxy, headers)):
            return False
        try:
            address = ip_address(client[0])
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._policy.trusted_networks)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        if origin.lower() in self._policy.allowed_origins:
            return True
        parts = urlsplit(origin.lower())
        return parts.scheme in {"http", "https"} and parts.netloc != "" and parts.netloc == host.lower()

    def _is_open(self, path: str) -> bool:
        return path in self._policy.open_paths or path.startswith("/docs/static/")


class SlowDown:
    """Slows down an address that tries tokens: after a few wrong ones each further answer takes longer.

    Whoever sends a right one is not held up, so that callers behind one address do not lock each other out.
    """

    FREE: Final = 5
    LONGEST_SECONDS: Final = 2.0
    FORGOTTEN_SECONDS: Final = 60.0
    ADDRESSES: Final = 1024

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def owner(self, scope: Scope, found: Awaitable[Caller]) -> Caller:
        """Return the owner of a token; hold back the error that says that it is wrong."""
        try:
            return await found
        except TokenMissing:
            raise
        except Unauthenticated:
            await self._sleep(self._delay(_address(scope) or ""))
            raise

    def _delay(self, address: str) -> float:
        now = self._clock()
        count, last = self._tries.pop(address, (0, now))
        count = 1 if now - last > self.FORGOTTEN_SECONDS else count + 1
        self._tries[address] = (count, now)
        if len(self._tries) > self.ADDRESSES:
            self._tries.popitem(last=False)
        return min(0.1 * max(0, count - self.FREE), self.LONGEST_SECONDS)


class _BodyGuard:
    """Bounds every body, uploads by limits of their own."""

    def __init__(self, max_bytes: int, uploads: Sequence[RawUpload]) -> None:
        self._max_bytes = max_bytes
        self._uploads = tuple(uploads)

    def bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Return what receives the request's body and raises `BodyTooLarge` when it is over its limit."""
        if not _may_have_body(scope):
            return receive
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise UnsupportedEncoding(given=encoding)
        upload = self._upload(scope)
        scope[RAW_BODY] = upload is not None
        limit = upload.max_bytes if upload else self._max_bytes
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise BodyTooLarge(limit=limit)
        counted = _counting(receive, limit)
        return counted if upload is None else _noting(counted)

    def _upload(self, scope: Scope) -> RawUpload | None:
        matching = (
            upload
            for upload in self._uploads
            if upload.method == scope["method"] and upload.pattern.fullmatch(scope["path"])
        )
        return next(matching, None)


def _bearer(headers: Headers) -> str | None:
    """Return the token of `Authorization: Bearer TOKEN`; None where there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _is_of_proxy(header: str) -> bool:
    return header in _PROXY_HEADERS or header.startswith(_PROXY_PREFIX)


def host_name(host: str) -> str | None:
    """Return the lower-case name or address of a `Host` header without its port; None when it is no such header."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::(\d{1,5}))?", host)
    return match[1].strip("[]").lower() if match else None


def _without_body(send: Send) -> Send:
    """Send the head of a response without its body. A streamed response sees a disconnect."""
    ended = False

    async def send_head(message: Message) -> None:
        nonlocal ended
        if message["type"] != "http.response.body":
            await send(message)
            return
        if not ended:
            ended = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if message.get("more_body"):
            raise ClientDisconnect

    return send_head


def _check_path(scope: Scope) -> None:
    """Refuse a path that is no text: the server would put the same sign for every byte that it cannot decode."""
    raw: bytes = scope.get("raw_path") or b""
    if b"%" in raw:
        try:
            unquote_to_bytes(raw).decode()
        except UnicodeDecodeError:
            raise PathNotUtf8 from None


def _log_request(scope: Scope, method: str, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS and status < 400 else logging.INFO
    caller: Caller | None = scope.get(CALLER)
    access_logger.log(
        level,
        "http_request",
        extra={
            "method": method,
            "path": scope.get(_FULL_PATH, scope["path"]),  # without the query: it may hold secrets
            "status": status,
            "caller": caller.name if caller else None,
            "address": _address(scope),
            "duration_ms": round(seconds * 1000, 1),
        },
    )


def _stay_in_project(headers: MutableHeaders, prefix: str) -> None:
    """Let the address of what was made lead into the project that it was made in."""
    location = headers.get("location", "")
    if location.startswith("/api/"):
        headers["location"] = prefix + location


def _may_have_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _noting(receive: Receive) -> Receive:
    """Note for the audit trail which bytes came; of a file that comes in parts those of this part."""
    digest, size = hashlib.sha256(), 0

    async def note() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            digest.update(message.get("body", b""))
            size += len(message.get("body", b""))
            action = current_action.get()
            if action is not None and not message.get("more_body"):
                action.note_body(digest.hexdigest(), size)
        return message

    return note


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
