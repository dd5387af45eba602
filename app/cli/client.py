"""The HTTP API seen from the command line: every failure becomes an exit code and a text that helps."""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import httpx
import typer

from app.access.loopback import is_loopback
from app.cli.command import PROJECT_VARIABLE, CliFailure, ExitCode, Misused, typed
from app.cli.credentials import SavedLogin, credentials_file, saved_login
from app.cli.output import print_json
from app.domain.texts import DEFAULT_LANGUAGE, Language
from app.secret_values import SecretFileError, file_variable, secret_from_file, variable

PREFIX: Final = "/api/v1"
PAGE: Final = 100
STREAM_SILENCE_SECONDS: Final = 60.0
"""The service sends a heartbeat every 15 seconds; longer silence is a dead connection."""
UPLOAD_SILENCE_SECONDS: Final = 120.0
_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first one that is set decides, as POSIX says


@dataclass(frozen=True)
class StreamEvent:
    """One event of a stream; `id` is where a reader resumes after it."""

    event: str
    data: Any
    id: str | None = None


def parse_events(chunks: Iterable[bytes]) -> Iterator[StreamEvent]:
    """Yield the events in a byte stream; a half-sent event at the end is dropped, comments are heartbeats."""
    name, event_id = "message", None
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield StreamEvent(event=name, data=_value("\n".join(data)), id=event_id)
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                name = value
            case "data":
                data.append(value)
            case "id":
                event_id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Split at line feeds only: texts may hold other characters that some would call line ends."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Unreachable(CliFailure):
    """No service answers there."""

    exit_code = ExitCode.UNREACHABLE

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(
            f"No service answers at {url} ({problem}).",
            notes=(f"Start one with: {typed('dev')}", "Or name another one with --url or DEEPE_URL."),
        )


class ServiceRefused(CliFailure):
    """The service said no (4xx); `problem` is its problem document."""

    exit_code = ExitCode.REFUSED

    def __init__(self, problem: Mapping[str, Any]) -> None:
        self.problem = dict(problem)
        self.status = int(problem["status"])
        self.code = str(problem.get("code", ""))
        super().__init__(
            str(problem["detail"]),
            notes=[
                *([f"Log in: {typed('login')}"] if self.code == "token_missing" else []),
                *(
                    f"{entry['pointer']}: {entry['detail']}" if entry["pointer"] else str(entry["detail"])
                    for entry in problem.get("errors", ())
                ),
            ],
        )

    def document(self) -> dict[str, Any]:
        return self.problem


class ServiceFailed(ServiceRefused):
    """The service failed (5xx)."""

    exit_code = ExitCode.SERVER_ERROR


class ConnectionLost(CliFailure):
    """A stream broke off; it can be resumed."""

    exit_code = ExitCode.UNREACHABLE


class Api:
    """Calls the service at `url`. Paths are relative to `/api/v1`.

    Without a token the environment gives one, else what `deepe login` kept; an empty one stands for none. So does
    an empty project.
    """

    def __init__(
        self, url: str, *, token: str | None = None, project: str | None = None, timeout: float = 30.0
    ) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise Unreachable(url, "the address must begin with http:// or https://")
        headers = {"Accept-Language": accept_language(os.environ), "User-Agent": "deepe"}
        self.token_from: str | None = None
        """Where the token comes from: a variable, or the file of `deepe login`."""
        saved = None
        if token is None:
            token, self.token_from = _token_of(os.environ), token_variable(os.environ)
            saved = saved_login(self.url) if not token else None
        if token:
            headers["Authorization"] = f"Bearer {token}"
        elif saved is not None:
            self.token_from = f"deepe login ({credentials_file()})"
        self._http = httpx.Client(
            base_url=self.url + _prefix(os.environ.get(PROJECT_VARIABLE) if project is None else project) + PREFIX,
            headers=headers,
            timeout=timeout,
            auth=None if saved is None else SavedLogin(self.url, saved),
            # a proxy of the company has nothing to do with a service on this machine
            trust_env=not is_loopback(parts.hostname),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return the document at `path`."""
        return self._document("GET", path, params=_given(params))

    def post(self, path: str, body: Any = None) -> Any:
        """Create or act; the idempotency key makes the one repetition after a broken connection harmless."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return self._document("POST", path, json={} if body is None else body, headers=headers)

    def put_bytes(self, path: str, content: bytes, *, etag: str | None = None) -> Any:
        """Upload raw bytes; `etag` names what they replace, without one nothing is replaced."""
        precondition = {"If-None-Match": "*"} if etag is None else {"If-Match": etag}
        headers = {"Content-Type": "application/octet-stream", **precondition}
        return self._document("PUT", path, content=content, headers=headers)

    def put_file(self, path: str, file: Path, params: Mapping[str, Any] | None = None) -> Any:
        """Upload a file piece by piece; the service may take its time to check it."""
        # a table with one column looks like plain text, so that its name says what it is
        kinds = {".csv": "text/csv", ".tsv": "text/tab-separated-values"}
        headers = {"Content-Type": kinds.get(file.suffix.lower(), "application/octet-stream")}
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            with file.open("rb") as content:
                timeout = httpx.Timeout(self._http.timeout.connect, read=None, write=UPLOAD_SILENCE_SECONDS)
                return self._document("PUT", path, params=given, content=content, headers=headers, timeout=timeout)
        except OSError as error:
            raise CliFailure(f"{file}: {error.strerror}") from None

    def delete_at_once(self, path: str) -> None:
        """Delete what stands at `path`, whatever it is by now."""
        self._document("DELETE", path)

    def upload_offset(self, path: str) -> tuple[int, bool]:
        """Return how many bytes of a file are there, and whether it is whole."""
        try:
            headers = self._response("HEAD", path).headers
        except ServiceRefused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return 0, False
            raise
        return int(headers.get("Upload-Offset", 0)), headers.get("Upload-Complete") == "?1"

    def upload_rest(self, path: str, file: Path, *, start: int, total: int) -> None:
        """Upload a file from `start` on."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(total - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        timeout = httpx.Timeout(self._http.timeout.connect, read=None, write=UPLOAD_SILENCE_SECONDS)
        try:
            with file.open("rb") as content:
                content.seek(start)
                self._document("PUT", path, content=content, headers=headers, timeout=timeout)
        except OSError as error:
            raise CliFailure(f"{file}: {error.strerror}") from None

    def fetch(self, path: str, file: Path, *, start: int, params: Mapping[str, Any] | None = None) -> None:
        """Write what stands at `path`, from `start` on, behind what is in a file. `ConnectionLost`: a part came."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        timeout = httpx.Timeout(self._http.timeout.connect, read=STREAM_SILENCE_SECONDS)
        try:
            with self._http.stream("GET", path, headers=headers, params=_given(params), timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                with file.open("ab" if response.status_code == HTTPStatus.PARTIAL_CONTENT else "wb") as stream:
                    for piece in response.iter_raw():
                        stream.write(piece)
        except httpx.TransportError as error:
            raise ConnectionLost(f"The connection to {self.url} was lost ({_words(error)}).") from error

    def etag(self, path: str) -> str | None:
        """Return the version of what stands at `path`."""
        etag: str | None = self._response("GET", path).headers.get("ETag")
        return etag

    def bytes_or_none(self, path: str) -> tuple[bytes, str | None] | None:
        """Return the bytes at `path` with their version; None if nothing is there."""
        try:
            response = self._response("GET", path)
        except ServiceRefused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        return response.content, response.headers.get("ETag")

    def replace(self, path: str, body: Any) -> Any:
        """Replace what stands at `path` as it was read just now."""
        etag = self.etag(path)
        return self._document("PUT", path, json=body, headers={"If-Match": etag} if etag else {})

    def put(self, path: str, body: Any) -> Any:
        """Make what stands at `path`, or replace it, whatever it is by now."""
        return self._document("PUT", path, json=body, headers={"If-Match": "*"})

    def delete(self, path: str, params: Mapping[str, Any] | None = None) -> None:
        """Delete what stands at `path` as it was read just now."""
        etag = self.etag(path)
        headers = {"If-Match": etag} if etag else {}
        self._document("DELETE", path, headers=headers, params=_given(params))

    def patch(self, path: str, changes: Mapping[str, Any]) -> Any:
        """Change what stands at `path` as it was read just now (JSON merge patch)."""
        headers = {"If-Match": self.etag(path) or "*", "Content-Type": "application/merge-patch+json"}
        return self._document("PATCH", path, content=json.dumps(changes).encode(), headers=headers)

    def items(
        self, path: str, params: Mapping[str, Any] | None = None, *, limit: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the entries of a list, page after page."""
        left, cursor = limit, None
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            page = self.get(path, {**(params or {}), "limit": size, "cursor": cursor})
            yield from page["items"]
            cursor = page.get("next_cursor")
            left = None if left is None else left - len(page["items"])
            if not cursor:
                return

    def stream(
        self, method: str, path: str, *, body: Any = None, last_event_id: str | None = None
    ) -> Iterator[StreamEvent]:
        """Yield server-sent events until the service ends the stream; `ConnectionLost` if it breaks off."""
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        timeout = httpx.Timeout(10.0, read=STREAM_SILENCE_SECONDS)
        try:
            with self._http.stream(method, path, json=body, headers=headers, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                yield from parse_events(response.iter_bytes())
        except httpx.TransportError as error:
            raise ConnectionLost(f"The connection to {self.url} was lost ({_words(error)}).") from error

    def _document(self, method: str, path: str, **request: Any) -> Any:
        response = self._response(method, path, **request)
        if response.status_code == HTTPStatus.NO_CONTENT or not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise _refusal(response) from None

    def _response(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._send(method, path, **request)
        except httpx.TransportError as error:
            raise Unreachable(self.url, _words(error)) from error
        if not response.is_success:
            raise _refusal(response)
        return response

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **request)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            if hasattr(request.get("content"), "read"):
                raise  # a file that was read halfway
            # a kept-alive connection that the service closed meanwhile, or a service that was just restarted
            return self._http.request(method, path, **request)


def call_service(url: str, request: Callable[[Api], Any], *, as_json: bool, timeout: float = 30.0) -> Any:
    """Return the answer to `request`. With `as_json` it is printed, and the command ends."""
    with Api(url, timeout=timeout) as api:
        answer = request(api)
    if as_json:
        print_json(answer)
        raise typer.Exit
    return answer


def list_items(
    url: str, path: str, params: Mapping[str, Any] | None = None, *, limit: int | None = None, as_json: bool
) -> list[dict[str, Any]]:
    """Return the entries of a list. With `as_json` they are printed, and the command ends."""
    found = call_service(url, lambda api: {"items": list(api.items(path, params, limit=limit))}, as_json=as_json)
    items: list[dict[str, Any]] = found["items"]
    return items


def _prefix(project: str | None) -> str:
    return f"/projects/{segment(project)}" if project else ""


def segment(name: str) -> str:
    """Return `name` as one segment of a path."""
    return quote(name, safe="")


def token_variable(environ: Mapping[str, str]) -> str | None:
    """Return the variable that gives the token; None if none does."""
    return next((name for name in (file_variable("api_token"), variable("api_token")) if environ.get(name)), None)


def _token_of(environ: Mapping[str, str]) -> str | None:
    try:
        return secret_from_file("api_token", environ) or environ.get(variable("api_token"))
    except SecretFileError as error:
        raise Misused(str(error)) from None


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _refusal(response: httpx.Response) -> ServiceRefused:
    kind = ServiceFailed if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR else ServiceRefused
    try:
        problem = response.json()
        if isinstance(problem, dict) and {"status", "detail"} <= problem.keys():
            return kind(problem)
    except (ValueError, json.JSONDecodeError):
        pass
    return kind(
        {
            "status": response.status_code,
            "code": "not_our_service",
            "detail": f"{response.url} answered {response.status_code}, but not as this service does; "
            "does another program listen there?",
        }
    )


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def language(environ: Mapping[str, str]) -> Language:
    """Return the language of `environ`, English when it is none of ours."""
    locale = next((environ[name] for name in _VARIABLES if environ.get(name)), "")
    code = locale.replace("-", "_").partition("_")[0].lower()
    return Language(code) if code in list(Language) else DEFAULT_LANGUAGE


def accept_language(environ: Mapping[str, str]) -> str:
    """Return the header that asks for the person's language."""
    return language(environ).value
