"""A small application on our HTTP foundation, and a client for it."""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import httpx
import sqlalchemy.exc
from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from app.api.application import HttpOptions, new_application
from app.api.conditional import IfMatch, etag_of
from app.api.errors import problem_responses
from app.api.guards import AccessPolicy, RawUpload
from app.api.limits import CallerLimits
from app.api.pagination import Page, PageParams, page_params
from app.api.routing import Router
from app.domain.access import Permission
from app.domain.enums import TrainingType
from app.domain.errors import NotFound

BASE_URL = "http://127.0.0.1:8000"
LIMIT = 2048
UPLOAD_LIMIT = 100_000


class ThingNotFound(NotFound):
    code = "route_not_found"  # any code with a text: this class exists in the tests only


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: str = Field(max_length=20)


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=10, pattern=r"^[^!]+$")
    size: int = Field(0, ge=0, le=9)
    kind: TrainingType = TrainingType.CHAT
    parts: dict[str, Part] = {}
    tags: list[int | str] = []
    anything: Any = None


Paging = Annotated[PageParams, Depends(page_params("created_at", "name", default="-created_at"))]

router = Router(changes=Permission.RUN, prefix="/api/v1")


@router.get("/things")
async def list_things(paging: Paging) -> Page[int]:
    start = 0 if paging.after is None else int(paging.after[1])
    items = list(range(start, start + paging.limit))
    value = f"value {items[-1]}" if paging.sort == "name" else datetime(2026, 1, 1, tzinfo=UTC)
    return paging.page(items, (value, str(items[-1] + 1)))


@router.post("/things", status_code=201)
async def create_thing(thing: Thing) -> Thing:
    return thing


@router.get("/things/{name}", responses=problem_responses(ThingNotFound))
async def get_thing(name: str) -> dict[str, str]:
    raise ThingNotFound


@router.put("/things/{name}", responses=problem_responses(ThingNotFound))
async def replace_thing(name: str, thing: Thing, precondition: IfMatch, response: Response) -> Thing:
    precondition.require(3)
    response.headers["ETag"] = etag_of(4)
    return thing


@router.patch("/things/{name}")
async def patch_thing(name: str, patch: dict[str, Any], precondition: IfMatch) -> dict[str, Any]:
    return patch


@router.post("/things/{name}/poke", status_code=204)
async def poke_thing(name: str) -> None: ...


@router.post("/things/{name}:poke", status_code=204)
async def poke_thing_by_action(name: str) -> None: ...


@router.get("/pieces", response_class=PlainTextResponse)
async def read_pieces() -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"piece"

    return StreamingResponse(pieces(), headers={"ETag": '"1"'})


@router.get("/numbers/{number}")
async def get_number(number: int) -> int:
    return number


@router.put("/files/{name}")
async def put_file(name: str, request: Request) -> int:
    return len(await request.body())


@router.put("/streams/{name}")
async def put_stream(name: str, request: Request) -> int:
    return sum([len(chunk) async for chunk in request.stream()])


@router.get("/fails/{how}")
async def fail(how: str) -> None:
    raise FAILURES[how]()


async def _failing_commit() -> AsyncIterator[None]:
    yield
    raise sqlalchemy.exc.OperationalError("COMMIT", None, sqlite3.OperationalError("database is locked"))


@router.post("/commits", status_code=201)
async def create_commit(session: Annotated[None, Depends(_failing_commit, scope="function")]) -> str:
    return "created"


@router.get("/broken-stream", response_class=PlainTextResponse)
async def read_broken_stream() -> Response:
    async def send(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OSError("in the middle")

    return _Raw(send)


class _Raw(Response):
    def __init__(self, app: Callable[..., Any]) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


def _operational(message: str) -> Exception:
    return sqlalchemy.exc.OperationalError("SELECT 1", None, sqlite3.OperationalError(message))


class _PostgresError(Exception):
    sqlstate = "40P01"


FAILURES: dict[str, Callable[[], BaseException]] = {
    "locked": lambda: _operational("database is locked"),
    "unreadable": lambda: _operational("unable to open database file"),
    "full-database": lambda: _operational("database or disk is full"),
    "deadlock": lambda: sqlalchemy.exc.DBAPIError("UPDATE", None, _PostgresError("deadlock")),
    "no-connection-left": lambda: sqlalchemy.exc.TimeoutError("pool"),
    "refused": lambda: ConnectionRefusedError(111, "refused"),
    "full-disk": lambda: OSError(28, "No space left on device"),
    "wrong-sql": lambda: sqlalchemy.exc.ProgrammingError("SELEC 1", None, Exception("syntax")),
    "bug": lambda: KeyError("secret value"),
    "cancelled": asyncio.CancelledError,
}


def make_app(*, limits: CallerLimits | None = None, **access: Any) -> FastAPI:
    app = new_application(
        HttpOptions(
            version="1",
            access=AccessPolicy(**access),
            max_body_bytes=LIMIT,
            limits=limits,
            uploads=[RawUpload("PUT", re.compile(r"/api/v1/(files|streams)/[^/]+"), UPLOAD_LIMIT)],
        )
    )
    app.include_router(router)
    return app


@asynccontextmanager
async def client_of(
    app: FastAPI, *, base_url: str = BASE_URL, client: tuple[str, int] = ("127.0.0.1", 4000), **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, client=client)
    async with httpx.AsyncClient(transport=transport, base_url=base_url, **options) as session:
        yield session
