"""Accelerators over HTTP: a person puts a quarantined one back to use."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.store import job_attempts
from app.store.session import Database
from tests.api.client import MethodsApp, methods_app
from tests.api.resources import ROUTERS
from tests.job_rows import FAILURE, START, add_job, add_node, cards, claim


@pytest.fixture
async def app(database: Database, tmp_path: Path) -> AsyncIterator[MethodsApp]:
    async with methods_app(database, tmp_path / "home", routers=ROUTERS) as running:
        yield running


async def test_release_of_an_accelerator(app: MethodsApp) -> None:
    node = await add_node(app.database, "gpu-box", accelerators=cards(1))
    await add_job(app.database)
    won = await claim(app.database, node)
    assert won is not None
    address = "/api/v1/nodes/gpu-box/accelerators/card-0:release"

    in_use = await app.client.post(address)
    unknown = await app.client.post(address.replace("card-0", "card-9"))
    no_node = await app.client.post(address.replace("gpu-box", "nowhere"))
    async with app.database.writing() as session:
        await job_attempts.finish(session, won, replace(FAILURE, exit={"unkillable": 2}), now=START)
    released = [await app.client.post(address) for _ in range(2)]

    assert (in_use.status_code, in_use.json()["code"]) == (409, "accelerator_in_use")
    assert won.job.id in in_use.json()["detail"]
    assert (unknown.status_code, unknown.json()["code"]) == (404, "accelerator_not_found")
    assert (no_node.status_code, no_node.json()["code"]) == (404, "node_not_found")
    assert [answer.status_code for answer in released] == [200, 200]
    assert released[0].json()["name"] == "gpu-box"
