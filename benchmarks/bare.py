"""The peers of `benchmarks.http_api`: FastAPI and nothing else, and FastAPI with one query of one row.

The database is a SQLite file named by BARE_DATABASE, used as ours is: WAL, SQLModel, aiosqlite.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel
from sqlmodel import Field, SQLModel

from app.domain.projects import DEFAULT_SCOPE
from app.store.session import Database


class Thing(BaseModel):
    """What is sent and what comes back."""

    name: str
    kind: str
    url: str


class BareRow(SQLModel, table=True):
    """A row of the peer's only table."""

    id: int = Field(primary_key=True)
    name: str
    kind: str
    url: str


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Create the table and its row."""
    async with database.writing() as session:
        connection = await session.connection()
        await connection.run_sync(SQLModel.metadata.tables["barerow"].create)
        session.add(BareRow(id=1, name="thing", kind="ollama", url="http://127.0.0.1:11434"))
    yield
    await database.close()


database = Database(os.environ["BARE_DATABASE"], scope=DEFAULT_SCOPE)
app = FastAPI(openapi_url=None, lifespan=lifespan)


@app.get("/thing")
async def get_thing() -> Thing:
    """Answer with a constant."""
    return Thing(name="thing", kind="ollama", url="http://127.0.0.1:11434")


@app.get("/row")
async def get_row() -> Thing:
    """Answer with a row that is read by its key."""
    async with database.reading() as session:
        row = await session.get_one(BareRow, 1)
    return Thing(name=row.name, kind=row.kind, url=row.url)


@app.post("/thing", status_code=201)
async def create_thing(thing: Thing) -> Thing:
    """Answer with what was sent."""
    return thing


@app.post("/row", status_code=201)
async def change_row(thing: Thing) -> Thing:
    """Write one row and commit."""
    async with database.writing() as session:
        row = await session.get_one(BareRow, 1)
        row.name = thing.name
    return thing
