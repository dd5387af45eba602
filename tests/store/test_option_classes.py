"""Descriptions of configuration classes are kept once, on both databases."""

from app.store import option_classes
from app.store.session import Database
from tests.job_rows import START

ONE, OTHER = {"path": "lib.One", "fields": []}, {"path": "lib.Other", "fields": [{"name": "x"}]}


async def test_keeps_each_document_once_and_returns_those_that_are_there(database: Database) -> None:
    async with database.writing() as session:
        await option_classes.keep(session, {"a": ONE}, now=START)
        await option_classes.keep(session, {"b": OTHER, "a": ONE}, now=START)
        await option_classes.keep(session, {}, now=START)

    async with database.reading() as session:
        assert await option_classes.load(session, ["a", "b", "c"]) == {"a": ONE, "b": OTHER}
        assert await option_classes.load(session, []) == {}
